"""Images in a prompt, as the rows that an encoder computed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Rows of an image at positions [start, end) of a prompt, which has token 0 there. `offset`: the image's row at
    `start`. Equal digests mean equal rows and rope positions. If `is_bidirectional`, the rows see each other both ways.
    `rope_positions` are relative to the first row's; the row after the span follows the highest of them."""

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
    """Finds the spans in a range of positions by bisection. They do not overlap, and are sorted by position."""

    def __init__(self, spans: Sequence[ImageSpan]) -> None:
        self._starts, self._ends = [span.start for span in spans], [span.end for span in spans]

    def within(self, start: int, end: int) -> range:
        return range(bisect_right(self._ends, start), bisect_left(self._starts, end))
