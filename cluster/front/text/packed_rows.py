"""Rows of whole answers, packed: eight bytes for each token and top logprob."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from llamaclust.core.sampling import RowResult, TopLogprobs


class PackedRows(Sequence[RowResult]):
    """Tokens with their logprobs and the likeliest in their places; nothing else of a row is kept. A row is made each
    time it is read."""

    __slots__ = ("_ends", "_logprobs", "_tokens", "_tops")

    def __init__(self) -> None:
        self._tokens = array("i")
        self._logprobs = array("f")
        self._tops = bytearray()
        self._ends = array("q")  # of each row's part of `_tops`

    def extend(self, rows: Iterable[RowResult]) -> None:
        for row in rows:
            self._tokens.append(row.token)
            self._logprobs.append(row.logprob)
            self._tops += TopLogprobs.of(row.top_logprobs).packed
            self._ends.append(len(self._tops))

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def entries(self) -> int:
        """Tokens and top logprobs."""
        return len(self._tokens) + len(TopLogprobs(self._tops))

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, place: int) -> RowResult: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[RowResult, ...]: ...
    def __getitem__(self, place: int | slice) -> RowResult | tuple[RowResult, ...]:
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(len(self))))
        place = range(len(self))[place]
        begin, end = self._ends[place - 1] if place else 0, self._ends[place]
        return RowResult(self._tokens[place], self._logprobs[place], TopLogprobs(bytes(self._tops[begin:end])))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | PackedRows) else NotImplemented

    def __repr__(self) -> str:
        return repr(tuple(self))
