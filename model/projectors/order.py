"""The order of a tile's patches in an encoder. The patches of a merge group, and of a window, are contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PatchOrder:
    """The order of patches in an encoder's input. `patches` [rows] has the patches' row-major indices in the tile.
    `windows` [rows, 2] has the rows [start, end) of each row's window. `places` [merged rows] has the row-major index
    of each merged row in the tile. None means that merged rows are in row-major order."""

    patches: Int32
    windows: Int32 | None = None
    places: Int32 | None = None


def in_groups(height: int, width: int, merge: int) -> PatchOrder:
    return PatchOrder(_grouped(height, width, merge).reshape(-1))


def in_windows(height: int, width: int, merge: int, side: int) -> PatchOrder:
    """Returns an order in which the patches of each window, and of each merge group, are contiguous. `side` is a
    window's side in merge groups."""
    groups = _grouped(height, width, merge)
    lines, columns = height // merge, width // merge
    parts = [
        np.arange(lines * columns, dtype=np.int32).reshape(lines, columns)[y : y + side, x : x + side].reshape(-1)
        for y in range(0, lines, side)
        for x in range(0, columns, side)
    ]
    places = np.concatenate(parts)
    counts = np.array([len(part) for part in parts]) * merge * merge
    ends = np.cumsum(counts)
    windows = np.stack((ends - counts, ends), axis=1).repeat(counts, axis=0)
    return PatchOrder(groups[places].reshape(-1), windows.astype(np.int32), places)


def _grouped(height: int, width: int, merge: int) -> Int32:
    """Returns the patch indices [groups, merge * merge] of all merge groups."""
    numbers = np.arange(height * width, dtype=np.int32).reshape(height // merge, merge, width // merge, merge)
    return numbers.swapaxes(1, 2).reshape(-1, merge * merge)
