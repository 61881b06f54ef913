"""Fields that bound the reasoning of an answer, which all chats share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llamaclust.cluster.front.schema import Body
from llamaclust.cluster.front.text.reasoning import MAX_MESSAGE_CHARACTERS, ReasoningBudget


class ReasoningFields(Body):
    """A budget of reasoning."""

    reasoning_budget: Annotated[int, Field(ge=-1)] = -1
    """Tokens of reasoning at most, after which its end follows; 0: the answer begins without it; -1: no limit."""
    reasoning_budget_message: Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS)] = ""
    """What stands before an end that the budget forces."""

    @property
    def answer_budget(self) -> ReasoningBudget | None:
        """None: no limit."""
        return self.budget_of(self.reasoning_budget)

    def budget_of(self, tokens: int) -> ReasoningBudget | None:
        """Another number of tokens, with the same message."""
        return None if tokens < 0 else ReasoningBudget(tokens, self.reasoning_budget_message)
