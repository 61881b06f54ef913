"""Bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema

from llamaclust.cluster.front.dialects.anthropic.tools import (
    OutputConfig,
    ThinkingField,
    ToolChoice,
    ToolsField,
    output_grammar,
)
from llamaclust.cluster.front.dialects.anthropic.turns import merged_turns, read_system, read_turn
from llamaclust.cluster.front.fields.reasoning import ReasoningFields
from llamaclust.cluster.front.fields.sampling import AnswerFields
from llamaclust.cluster.front.schema import LimitField, StopField
from llamaclust.cluster.front.text.chat import ChatRequest, ToolUse, effort_variables, prompt_end
from llamaclust.cluster.front.text.reasoning import ReasoningBudget
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling import Grammar

_BLOCKS: Final[dict[str, Any]] = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_CONTENT: Final = {"anyOf": [{"type": "string"}, _BLOCKS]}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _CONTENT},
}
_TurnField = Annotated[Any, BeforeValidator(read_turn), WithJsonSchema(_MESSAGE)]
_SystemField = Annotated[str, BeforeValidator(read_system), WithJsonSchema(_CONTENT)]


class MessagesBody(AnswerFields, ReasoningFields):
    """`POST /v1/messages`; `max_tokens` may be left out, for counting too."""

    model: str | None = None
    """Any name, unless `strict_model` is set."""
    messages: Annotated[list[_TurnField], FailFast(), Field(min_length=1, max_length=16_384)]
    """The chat so far. Blocks of type text, thinking, tool_use and tool_result; texts stand in place of pictures,
    documents and blocks of tools that other servers ran; successive messages of one role are one. A last message of
    role assistant is continued."""
    system: _SystemField = ""
    """The system prompt: text, or blocks of text. A billing header at its beginning is left out."""
    max_tokens: LimitField = None
    """Tokens of the answer, at most; by default what the context leaves."""
    stop_sequences: StopField = ()
    """The answer ends before the first of these."""
    tools: ToolsField = Field(default_factory=list)
    """Functions that the model may call, and bash_*, text_editor_* and memory_*; other tools are left out."""
    tool_choice: ToolChoice | None = None
    """Whether the answer calls them."""
    thinking: ThinkingField | None = None
    """Type `disabled`: the answer begins without thinking; otherwise as the model decides."""
    output_config: OutputConfig | None = None
    """A JSON schema that the answer obeys (`format`), and the `effort` that the chat template gets."""
    output_format: Any = None
    """An older name of `output_config.format`."""

    @property
    def tool_use(self) -> ToolUse:
        return ToolUse() if self.tool_choice is None else self.tool_choice.use

    def request(self) -> ChatRequest:
        """The chat of the body. ParameterError for fields that contradict each other."""
        self.tool_use.check(self.tools)
        turns = merged_turns(self.messages)
        if turns[-1].calls:
            raise ParameterError("messages", "end with a tool_use block: its tool_result must follow")
        system = [{"role": "system", "content": self.system}] if self.system else []
        effort = self.output_config.effort if self.output_config is not None else None
        return ChatRequest(
            (*system, *(message for turn in turns for message in turn.messages())),
            self.completion(self.max_tokens, self.stop_sequences, self._grammar()),
            tuple(self.tools),
            effort_variables(effort),
            prompt_end([turn.role for turn in turns], None, None),
            self.tool_use,
            may_reason=self.reasoning_budget != 0 and (self.thinking is None or self.thinking.type != "disabled"),
            reasoning_budget=self._budget,
        )

    @property
    def _budget(self) -> ReasoningBudget | None:
        """That of `thinking`, if it has one."""
        tokens = None if self.thinking is None else self.thinking.budget_tokens
        return self.answer_budget if tokens is None else self.budget_of(tokens)

    def _grammar(self) -> Grammar | None:
        grammar = None if self.output_config is None else self.output_config.grammar()
        return grammar or output_grammar(self.output_format, "output_format")
