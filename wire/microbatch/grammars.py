"""Grammars of output rows in sampling inputs: a grammar that several answers start with is sent once a message."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.core import limits
from llamaclust.core.bounds import UINT64, bounded
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampling import Grammar, GrammarRow, GrammarStart, Reasoning
from llamaclust.core.sampling_bounds import (
    MAX_GRAMMAR_BYTES,
    MAX_REASONING_END_TOKENS,
    MAX_TRIGGER_BYTES,
    MAX_TRIGGERS,
)
from llamaclust.proto import sampling_pb2 as sampling_proto


def grammar_out(grammar: Grammar) -> sampling_proto.Grammar:
    return sampling_proto.Grammar(definition=grammar.definition, triggers=grammar.triggers)


def grammar_in(message: sampling_proto.Grammar) -> Grammar:
    """ProtocolError for one out of bounds."""
    bounded("bytes of a grammar", len(message.definition.encode()), 1, MAX_GRAMMAR_BYTES)
    return Grammar(message.definition, _texts_in("triggers", message.triggers, 0))


def grammar_row_out(row: GrammarRow, grammars: dict[Grammar, int]) -> sampling_proto.GrammarRow:
    """Adds its grammar, if it starts, to the message's `grammars`."""
    start = None
    if row.start is not None:
        grammar, reasoning = row.start.grammar, row.start.reasoning
        index = None if grammar is None else grammars.setdefault(grammar, len(grammars))
        sent = None if reasoning is None else _reasoning_out(reasoning)
        start = sampling_proto.GrammarStart(grammar=index, tokens=row.start.tokens, reasoning=sent)
    return sampling_proto.GrammarRow(key=row.key, position=row.position, start=start, may_force=row.may_force)


def grammar_row_in(message: sampling_proto.GrammarRow, grammars: Sequence[Grammar]) -> GrammarRow:
    """ProtocolError for a row out of bounds, or a grammar that is not in the message."""
    position = bounded("position in an answer", message.position, 0, limits.MAX_CONTEXT_TOKENS)
    key = bounded("key of an answer", message.key, 0, UINT64)
    if not message.HasField("start"):
        return GrammarRow(key, position, may_force=message.may_force)
    return GrammarRow(key, position, _start_in(message.start, grammars), message.may_force)


def _start_in(message: sampling_proto.GrammarStart, grammars: Sequence[Grammar]) -> GrammarStart:
    grammar = None
    if message.HasField("grammar"):
        grammar = grammars[bounded("grammar", message.grammar, 0, len(grammars) - 1)]
    reasoning = _reasoning_in(message.reasoning) if message.HasField("reasoning") else None
    if grammar is None and reasoning is None:
        raise ProtocolError("a start of a grammar without any")
    return GrammarStart(grammar, _tokens_in(message.tokens, limits.MAX_CONTEXT_TOKENS), reasoning)


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
    budget = bounded("budget", message.budget, 0, limits.MAX_CONTEXT_TOKENS) if message.HasField("budget") else None
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
