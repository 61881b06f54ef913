"""Grammars of output rows in sampling inputs: a grammar that several answers start with is sent once a message."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.core import limits
from llamaclust.core.bounds import UINT64, bounded
from llamaclust.core.sampling import Grammar, GrammarRow, GrammarStart
from llamaclust.core.sampling_bounds import MAX_GRAMMAR_BYTES, MAX_TRIGGER_BYTES, MAX_TRIGGERS
from llamaclust.proto import sampling_pb2 as sampling_proto


def grammar_out(grammar: Grammar) -> sampling_proto.Grammar:
    return sampling_proto.Grammar(definition=grammar.definition, triggers=grammar.triggers)


def grammar_in(message: sampling_proto.Grammar) -> Grammar:
    """ProtocolError for one out of bounds."""
    bounded("bytes of a grammar", len(message.definition.encode()), 1, MAX_GRAMMAR_BYTES)
    bounded("triggers", len(message.triggers), 0, MAX_TRIGGERS)
    for trigger in message.triggers:
        bounded("bytes of a trigger", len(trigger.encode()), 1, MAX_TRIGGER_BYTES)
    return Grammar(message.definition, tuple(message.triggers))


def grammar_row_out(row: GrammarRow, grammars: dict[Grammar, int]) -> sampling_proto.GrammarRow:
    """Adds its grammar, if it starts, to the message's `grammars`."""
    start = None
    if row.start is not None:
        index = grammars.setdefault(row.start.grammar, len(grammars))
        start = sampling_proto.GrammarStart(grammar=index, tokens=row.start.tokens)
    return sampling_proto.GrammarRow(key=row.key, position=row.position, start=start, may_force=row.may_force)


def grammar_row_in(message: sampling_proto.GrammarRow, grammars: Sequence[Grammar]) -> GrammarRow:
    """ProtocolError for a row out of bounds, or a grammar that is not in the message."""
    position = bounded("position in an answer", message.position, 0, limits.MAX_CONTEXT_TOKENS)
    key = bounded("key of an answer", message.key, 0, UINT64)
    if not message.HasField("start"):
        return GrammarRow(key, position, may_force=message.may_force)
    index = bounded("grammar", message.start.grammar, 0, len(grammars) - 1)
    tokens = tuple(message.start.tokens)
    bounded("tokens of an answer", len(tokens), 0, limits.MAX_CONTEXT_TOKENS)
    bounded("token", max(tokens, default=0), 0, limits.MAX_VOCABULARY - 1)
    return GrammarRow(key, position, GrammarStart(grammars[index], tokens), message.may_force)
