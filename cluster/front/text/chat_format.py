"""How the served model's answers look: derived from its chat template when a chat first needs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llamaclust.cluster.front.text.threads import RENDERING, run_on
from llamaclust.core.errors import DeadlineError
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.chat.tools.answer_parser import AnswerParser
from llamaclust.model.chat.tools.call_sink import Tools
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS
from llamaclust.model.chat.tools.tool_format import ToolFormat
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.wire.rpc.deadlines import deadline

_HINTS: Final = ("tool", "think", "reason", "channel", "function", "response", "THINK", "RESPONSE")
"""A template without any of these texts knows neither calls nor reasoning: rendering it would tell nothing."""
_MAX_DERIVATION_S: Final = 60.0
"""Of a slow template, or on a busy machine; the next chat tries again."""
_MAX_WAIT_S: Final = 120.0
"""Of one chat, while others derive it."""

PLAIN: Final = ToolFormat(GENERIC_CALLS, takes_tool_role=False, takes_call_messages=False)


@dataclass(frozen=True, slots=True)
class AnswerReading:
    """How the text of an answer is read; the same for each choice."""

    form: ToolFormat
    tools: Tools = field(default_factory=dict)
    splits_reasoning: bool = True
    most_calls: int | None = None
    begun: str = ""  # what the prompt has written of the answer
    reads_unmarked: bool = False  # an answer that is nothing but calls without markers has these calls
    shown_control_ids: frozenset[int] = frozenset()  # control tokens that are part of the format

    @property
    def is_thinking(self) -> bool:
        """Whether the answer begins in reasoning."""
        tags = self.form.reasoning
        return tags is not None and tags.begin in self.begun and tags.end not in self.begun

    @property
    def _has_begun_text(self) -> bool:
        """True if the prompt has some of the answer behind its reasoning."""
        tags = self.form.reasoning
        return not self.is_thinking and bool(self.begun.rpartition("\0" if tags is None else tags.end)[2].strip())

    def parser(self) -> AnswerParser:
        return AnswerParser(
            self.form,
            self.tools,
            splits_reasoning=self.splits_reasoning,
            most_calls=self.most_calls,
            begun=self.begun,
            reads_unmarked=self.reads_unmarked and not self._has_begun_text,
        )


class ChatFormat:
    """The format of one template."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._lock = asyncio.Lock()
        self._form: ToolFormat | None = None
        self.control_ids: frozenset[int] = frozenset()

    async def get(self) -> ToolFormat:
        """DeadlineError where the template takes too long: what it does then tells nothing of its form."""
        async with deadline("the chat template's form", _MAX_WAIT_S), self._lock:
            if self._form is None:
                form = await run_on(RENDERING, self._derived)
                controls = [text for text in self._tokenizer.control_texts if len(text) > 1]
                shown = [text for text in controls if any(text in marker for marker in form.markers)]
                found = (self._tokenizer.token_id(text) for text in shown)
                self.control_ids = frozenset(token_id for token_id in found if token_id is not None)
                self._form = form
        return self._form

    def _derived(self) -> ToolFormat:
        source = self.template.source or ""
        if not any(hint in source for hint in _HINTS):
            return PLAIN
        end = time.monotonic() + _MAX_DERIVATION_S

        def render(messages: Sequence[Mapping[str, Any]], prompt: bool, variables: Mapping[str, Any]) -> str:
            if time.monotonic() > end:
                raise DeadlineError(f"the chat template's form was not known after {_MAX_DERIVATION_S:g} s; try again")
            return self.template.render(messages, prompt, **variables)

        return derive_format(source, render)
