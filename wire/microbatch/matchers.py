"""Encodes and decodes the values in sampling inputs that start matchers. A message contains each grammar once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import Integer, Size, bounded
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_VOCABULARY
from llamaclust.core.sampler.matchers import Grammar, MatcherStart, Reasoning
from llamaclust.proto import sampling_pb2 as sampling_proto
from llamaclust.wire.codec import parse, read, write
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES


@dataclass(frozen=True, slots=True)
class _Start:
    key: int
    grammar: int | None  # Index in the grammars of the message.
    tokens: Annotated[tuple[Annotated[int, Integer(0, MAX_VOCABULARY - 1)], ...], Size(0, MAX_CONTEXT_TOKENS)]
    reasoning: Reasoning | None
    may_force: bool
    drafts_forced: bool
    owner: int


@dataclass(frozen=True, slots=True)
class _Starts:
    grammars: Annotated[tuple[Grammar, ...], Size(0, MAX_BATCH_TOKENS)]
    starts: Annotated[tuple[_Start, ...], Size(0, MAX_BATCH_TOKENS)]

    def check(self) -> None:
        for start in self.starts:
            if start.grammar is not None:
                bounded("grammar", start.grammar, 0, len(self.grammars) - 1)
            elif start.reasoning is None:
                raise ProtocolError("a matcher has neither a grammar nor a reasoning budget; expected at least one")


def starts_out(starts: Iterable[MatcherStart]) -> sampling_proto.MatcherStarts:
    grammars: dict[Grammar, int] = {}
    sent = []
    for start in starts:
        grammar = None if start.grammar is None else grammars.setdefault(start.grammar, len(grammars))
        rest = start.tokens, start.reasoning, start.may_force, start.drafts_forced, start.owner
        sent.append(_Start(start.key, grammar, *rest))
    message = sampling_proto.MatcherStarts()
    write(_Starts(tuple(grammars), tuple(sent)), message)
    return message


def starts_in(data: bytes) -> tuple[MatcherStart, ...]:
    message = read(_Starts, parse(sampling_proto.MatcherStarts, data, MAX_INPUTS_BYTES))
    found = []
    for start in message.starts:
        grammar = None if start.grammar is None else message.grammars[start.grammar]
        rest = start.tokens, start.reasoning, start.may_force, start.drafts_forced, start.owner
        found.append(MatcherStart(start.key, grammar, *rest))
    return tuple(found)
