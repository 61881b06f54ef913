from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Image rows at positions [start, end) of a prompt. The prompt has token 0 at these positions. The span begins with
    row number `offset` of its image. Spans with equal digests have equal rows and rope positions. `is_bidirectional`
    means that all rows attend to each other. `rope_positions` are relative to the first row. The next text row gets the
    highest rope position of the span plus 1."""

    start: int
    end: int
    rows: NDArray[np.float32] = field(compare=False, repr=False)  # [end - start, levels * embedding]
    digest: bytes  # SHA-256
    is_bidirectional: bool = False
    rope_positions: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)  # [sections, end - start]
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return self.rows.nbytes // len(self.rows)


class SpanPlaces:
    """Finds the spans that overlap a range of positions. The spans are sorted and do not overlap each other."""

    def __init__(self, spans: Sequence[ImageSpan]) -> None:
        self._starts, self._ends = [span.start for span in spans], [span.end for span in spans]

    def within(self, start: int, end: int) -> range:
        return range(bisect_right(self._ends, start), bisect_left(self._starts, end))
