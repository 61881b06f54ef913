"""The reasoning of a chat's answer, as the last stage follows it: its budget, and a grammar that begins behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from llamaclust.cluster.front.text.chat_format import AnswerReading
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_CONTEXT_TOKENS
from llamaclust.core.sampling import Grammar, Reasoning
from llamaclust.core.sampling_bounds import MAX_TRIGGER_BYTES
from llamaclust.model.chat.tools.tool_format import ChannelCalls, ToolFormat
from llamaclust.model.grammars.reasoning import Place, ReasoningScanner
from llamaclust.model.tokenizers.tokenizer import Tokenizer

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
