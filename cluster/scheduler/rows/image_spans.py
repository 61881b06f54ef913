"""Images in a prompt, as the rows that an encoder computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Rows of an image at positions [start, end) of a prompt, which has token 0 there. `offset`: the image's row at
    `start`. Equal digests mean the same image, projector and settings: their rows and rope positions are equal. If
    `is_bidirectional`, the rows see each other both ways. `rope_positions` are relative to the rope position of the
    first row; the row after the span has the next position after the highest of them."""

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
