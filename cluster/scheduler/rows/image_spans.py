from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Image rows at positions [start, end) of a prompt. The prompt has token 0 at these positions."""

    start: int
    end: int
    rows: NDArray[np.float32] = field(compare=False, repr=False)  # [end - start, levels * embedding]
    digest: bytes  # SHA-256. Spans with equal digests have equal rows and rope positions.
    is_bidirectional: bool = False  # True if all rows attend to each other.
    # Relative to the first row. The next text row gets the highest rope position of the span plus 1.
    rope_positions: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)  # [sections, end - start]
    offset: int = 0  # Number of the span's first row in its image.

    @property
    def row_bytes(self) -> int:
        return self.rows.nbytes // len(self.rows)


class SpanPlaces:
    """An index that finds the image spans in a range of positions. Spans must be sorted and must not overlap."""

    def __init__(self, spans: Sequence[ImageSpan]) -> None:
        self._starts, self._ends = [span.start for span in spans], [span.end for span in spans]

    def within(self, start: int, end: int) -> range:
        return range(bisect_right(self._ends, start), bisect_left(self._starts, end))
