"""Chooses into how many bands (ranges of rows) a group divides a prompt, from the time that gathers wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.kernels.gathers import LEAST_BANDED_ROWS, LEAST_ROWS_OF_BAND, MOST_BANDS

_DECODED_ROWS = 8
"""Computing this number of rows takes about as long as decoding the weights."""
_MANY_ROWS = 256
"""Microbatches with at least this number of rows begin with two bands instead of one."""
_MUCH, _LITTLE = 0.04, 0.01
"""Shares of a microbatch's time. If gathers wait longer than `_MUCH`, more bands are tried; below `_LITTLE`, fewer."""
_REMEMBERED_RUNS = 64


class BandChoice:
    """Chooses the number of bands (ranges of rows). Row counts of the same bit length share measurements."""

    def __init__(self) -> None:
        self._alike: dict[int, _SimilarRuns] = {}

    def of(self, rows: int) -> int:
        return self._runs(rows).bands if rows >= LEAST_BANDED_ROWS else 1

    def add(self, rows: int, waited_share: float) -> None:
        if rows >= LEAST_BANDED_ROWS:
            self._runs(rows).add(rows, waited_share)

    def _runs(self, rows: int) -> _SimilarRuns:
        least = 1 << rows.bit_length() - 1
        begins = _SimilarRuns(min(MOST_BANDS, least // LEAST_ROWS_OF_BAND), 2 if rows >= _MANY_ROWS else 1)
        return self._alike.setdefault(least, begins)


@dataclass(slots=True)
class _SimilarRuns:
    most: int
    bands: int
    # Mean share of time that the last runs waited, by number of bands.
    _waited: dict[int, float] = field(default_factory=dict)
    _count: int = 0

    def add(self, rows: int, waited_share: float) -> None:
        before = self._waited.get(self.bands, waited_share)
        self._waited[self.bands] = (before + waited_share) / 2
        self._count += 1
        if self._count % _REMEMBERED_RUNS == 0:  # The network may have changed since.
            self._waited = {self.bands: self._waited[self.bands]}
        self.bands = self._next(rows)

    def _next(self, rows: int) -> int:
        decoded = _DECODED_ROWS / rows
        best = min(self._waited, key=lambda bands: self._waited[bands] + bands * decoded)
        more, fewer, waited = best + 1, best - 1, self._waited[best]
        if waited > max(_MUCH, decoded) and more not in self._waited and more <= self.most:
            return more
        if waited < max(_LITTLE, decoded) and fewer not in self._waited and fewer > 0:
            return fewer
        return best
