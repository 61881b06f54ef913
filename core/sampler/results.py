"""Results of output rows."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, overload

NOT_FINITE = "the logits are not finite numbers"


class TopLogprobs(Sequence[tuple[int, float]]):
    """Pairs (token, float32 logprob), best first, stored as packed bytes because a long answer has a million pairs."""

    __slots__ = ("packed",)
    _PAIR: Final = struct.Struct("=if")

    def __init__(self, packed: bytes | bytearray) -> None:
        self.packed = packed

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, float]]) -> TopLogprobs:
        if isinstance(pairs, TopLogprobs):
            return pairs
        return cls(struct.pack("=" + "if" * len(pairs), *chain.from_iterable(pairs)))

    def __len__(self) -> int:
        return len(self.packed) // self._PAIR.size

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return self._PAIR.iter_unpack(self.packed)

    @overload
    def __getitem__(self, place: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[tuple[int, float], ...]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, float] | tuple[tuple[int, float], ...]:
        return tuple(self)[place]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | TopLogprobs) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True, slots=True)
class RowResult:
    """A chosen or scored token. Logprobs are the float32 log-softmax of the raw logits."""

    token: int
    logprob: float
    top_logprobs: Sequence[tuple[int, float]] = ()  # Pairs (token, logprob), best first.
    # Reason why the row has no answer, such as logits that are not finite. `token` is then -1 and `logprob` NaN.
    failure: str | None = None
    mu: float | None = None  # Mirostat's state for the next token.
    forced: tuple[int, ...] = ()  # Tokens that must follow `token`. The matcher has accepted them already.
    is_deferred: bool = False  # True if the row must be computed again. `token` is then -1 and `logprob` NaN.
    forced_draft: tuple[int, ...] = ()  # Tokens that must follow `token`, returned as a draft.
    drafted: tuple[int, ...] = ()  # Tokens that an MTP head drafted after `token`.
    is_request_fault: bool = False  # True if the request itself causes the failure, so that every worker would fail.
    matcher_ns: int = field(default=0, compare=False)  # CPU time of the row's matcher, or 0 if it was short.
