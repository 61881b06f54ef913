"""How the served model's answers look, derived from its chat template, with its budget of reasoning."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from llamaclust.cluster.front.text.threads import RENDERING, run_on
from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.sampling import Grammar, Reasoning
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS, MAX_TRIGGER_BYTES
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.chat.tools.answer_parser import AnswerParser
from llamaclust.model.chat.tools.call_sink import Tools
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ToolFormat
from llamaclust.model.grammars.reasoning import Place, ReasoningScanner
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


MAX_MESSAGE_CHARACTERS: Final = 2048


@dataclass(frozen=True, slots=True)
class ReasoningBudget:
    """`tokens` of reasoning at most; then `message` and the tag that ends it follow."""

    tokens: int
    message: str = ""


def answer_reasoning(
    reading: AnswerReading | None, budget: ReasoningBudget | None, grammar: Grammar | None, tokenizer: Tokenizer
) -> Reasoning | None:
    """None where the answer has no reasoning apart, or there is nothing to follow. `grammar`: one that the reasoning is
    no part of. ParameterError for a message that would end the reasoning itself."""
    calls_end = reading is not None and reading.form.calls_end_reasoning and (grammar is None or bool(grammar.triggers))
    found = None if reading is None else _open_or_closed(reading, calls_end=calls_end)
    if found is None:
        return None
    delays = grammar is not None and (found.is_open or bool(grammar.triggers)) and not calls_end
    if budget is None:
        return replace(found, delays_grammar=True) if delays else None
    if any(end in budget.message for end in found.ends):
        raise ParameterError("reasoning_budget_message", "has the tag that ends the reasoning; leave it out")
    forced = tokenizer.encode_plain(budget.message, after_special=False) if budget.message else []
    for part in tokenizer.split_special(found.ends[0], parse_special=True):
        forced += tokenizer.encode_plain(part, after_special=False) if isinstance(part, str) else [part]
    tokens = min(budget.tokens, MAX_CONTEXT_TOKENS)
    return replace(found, forced=tuple(forced), budget=tokens, delays_grammar=delays)


def _open_or_closed(reading: AnswerReading, *, calls_end: bool) -> Reasoning | None:
    """The tags, and whether the prompt has begun reasoning. None where none can follow."""
    found = _tags(reading.form)
    if found is None or any(len(text.encode()) > MAX_TRIGGER_BYTES for text in (*found.begins, *found.ends)):
        return None
    if reading.tools and calls_end and not isinstance(reading.form.calls, ChannelCalls | None):
        found = replace(found, ends=(*found.ends, *reading.form.calls.frame.triggers))
    scanner = ReasoningScanner(found)
    scanner.feed(reading.begun.encode())
    return None if scanner.place is Place.BEHIND else replace(found, is_open=scanner.place is Place.INSIDE)


def _tags(form: ToolFormat) -> Reasoning | None:
    calls, tags = form.calls, form.reasoning
    if tags is not None:
        return Reasoning((tags.begin,), tags.ends, repeats=tags.repeats)
    if not isinstance(calls, ChannelCalls) or not calls.message_ends or calls.reasoning_header == calls.content_header:
        return None
    return Reasoning((calls.reasoning_header + calls.header_end,), calls.message_ends, repeats=True)
