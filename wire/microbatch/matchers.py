"""Matchers of answers in sampling inputs: a grammar that several of them start with is sent once a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llamaclust.core import limits
from llamaclust.core.bounds import UINT64, bounded
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampling import Grammar, MatcherStart, Reasoning
from llamaclust.core.sampling_bounds import (
    MAX_CONTEXT_TOKENS,
    MAX_GRAMMAR_BYTES,
    MAX_REASONING_END_TOKENS,
    MAX_TRIGGER_BYTES,
    MAX_TRIGGERS,
)
from llamaclust.proto import sampling_pb2 as sampling_proto
from llamaclust.wire.codec import parse
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES


def starts_out(starts: Iterable[MatcherStart]) -> sampling_proto.MatcherStarts:
    to = sampling_proto.MatcherStarts()
    grammars: dict[Grammar, int] = {}
    for start in starts:
        to.starts.add(
            key=start.key,
            grammar=None if start.grammar is None else grammars.setdefault(start.grammar, len(grammars)),
            tokens=start.tokens,
            reasoning=None if start.reasoning is None else _reasoning_out(start.reasoning),
            may_force=start.may_force,
            drafts_forced=start.drafts_forced,
        )
    for grammar in grammars:
        to.grammars.add(definition=grammar.definition, triggers=grammar.triggers)
    return to


def starts_in(data: bytes) -> tuple[MatcherStart, ...]:
    """ProtocolError for one out of bounds, or whose grammar is not in the message."""
    message = parse(sampling_proto.MatcherStarts, data, MAX_INPUTS_BYTES)
    bounded("matchers that start", len(message.starts), 0, limits.MAX_BATCH_TOKENS)
    grammars = [_grammar_in(grammar) for grammar in message.grammars]
    return tuple(_start_in(start, grammars) for start in message.starts)


def _grammar_in(message: sampling_proto.Grammar) -> Grammar:
    bounded("bytes of a grammar", len(message.definition.encode()), 1, MAX_GRAMMAR_BYTES)
    return Grammar(message.definition, _texts_in("triggers", message.triggers, 0))


def _start_in(message: sampling_proto.MatcherStart, grammars: Sequence[Grammar]) -> MatcherStart:
    grammar = None
    if message.HasField("grammar"):
        grammar = grammars[bounded("grammar", message.grammar, 0, len(grammars) - 1)]
    reasoning = _reasoning_in(message.reasoning) if message.HasField("reasoning") else None
    if grammar is None and reasoning is None:
        raise ProtocolError("a matcher without a grammar or a budget of reasoning")
    key, tokens = (
        bounded("key of an answer", message.key, 0, UINT64),
        _tokens_in(message.tokens, MAX_CONTEXT_TOKENS),
    )
    return MatcherStart(key, grammar, tokens, reasoning, message.may_force, message.drafts_forced)


def _reasoning_out(reasoning: Reasoning) -> sampling_proto.Reasoning:
    return sampling_proto.Reasoning(
        begins=reasoning.begins,
        ends=reasoning.ends,
        forced=reasoning.forced,
        budget=reasoning.budget,
        is_open=reasoning.is_open,
        repeats=reasoning.repeats,
        delays_grammar=reasoning.delays_grammar,
    )


def _reasoning_in(message: sampling_proto.Reasoning) -> Reasoning:
    budget = bounded("budget", message.budget, 0, MAX_CONTEXT_TOKENS) if message.HasField("budget") else None
    return Reasoning(
        _texts_in("beginnings of reasoning", message.begins, 1),
        _texts_in("ends of reasoning", message.ends, 1),
        _tokens_in(message.forced, MAX_REASONING_END_TOKENS),
        budget,
        message.is_open,
        message.repeats,
        message.delays_grammar,
    )


def _tokens_in(tokens: Sequence[int], most: int) -> tuple[int, ...]:
    bounded("tokens of an answer", len(tokens), 0, most)
    bounded("token", max(tokens, default=0), 0, limits.MAX_VOCABULARY - 1)
    return tuple(tokens)


def _texts_in(what: str, texts: Sequence[str], least: int) -> tuple[str, ...]:
    bounded(what, len(texts), least, MAX_TRIGGERS)
    for text in texts:
        bounded(f"bytes of one of the {what}", len(text.encode()), 1, MAX_TRIGGER_BYTES)
    return tuple(texts)
