"""How many rows a launch computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RowCount:
    """The grid is sized for `bucket` rows; `multiple` times the int32 at `address` are computed."""

    bucket: int
    address: np.uint64
    multiple: int = 1

    def times(self, multiple: int) -> RowCount:
        return RowCount(self.bucket * multiple, self.address, multiple)
