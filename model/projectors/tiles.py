"""The inputs of an image encoder: a tile's patches in the program's order, and their rows and columns in the tile."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.architectures.vision.family import Positions
from llamaclust.model.architectures.vision.layers import CHANNELS, PATCH_BIAS, POSITIONS
from llamaclust.model.projectors.order import Int32, PatchOrder, in_groups, in_windows
from llamaclust.model.projectors.positions import Float32, interpolated, interpolation_bytes, of_axes, read_floats
from llamaclust.model.projectors.projector import CLASS_ROW, Projector

_COLOUR_VALUES = 256
_PATCHES_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """The inputs of an encoder's program for one tile. `patches` [rows, program.hidden.width] is the given hidden
    state. `rope_positions` [2, rows] has each patch's row and column in the tile. `groups` [rows, 2] has the rows
    [start, end) to which each row attends."""

    patches: Float32
    rope_positions: Int32 | None
    groups: Int32 | None
    order: PatchOrder
    merged_rows: int

    def in_lines(self, rows: Float32) -> Float32:
        """Returns a copy of the encoder's merged rows [merged rows, width] in row-major order."""
        kept = rows[: self.merged_rows]
        if self.order.places is None:
            return kept.copy()
        out = np.empty_like(kept)
        out[self.order.places] = kept
        return out


def input_bytes(projector: Projector) -> int:
    """Returns the maximum number of bytes that a `TileReader` allocates for the inputs of a tile."""
    hp, rows, width = projector.hyperparameters, projector.most_program_rows, projector.program.hidden.width
    pixel_bytes = CHANNELS * hp.patch_size**2 * (rows + _PATCHES_AT_ONCE)
    floats = (rows + _PATCHES_AT_ONCE) * (width + hp.added_width) + _PATCHES_AT_ONCE * width
    if projector.family.class_place is not None:
        floats += rows * width  # The patches are copied to append the class row.
    if not hp.added_width:
        return pixel_bytes + 4 * floats
    side = isqrt(projector.file.tensor(POSITIONS).shape[0])
    return pixel_bytes + 4 * floats + interpolation_bytes(side, hp.added_width)


class TileReader:
    """Converts tiles to an encoder's inputs. Reads the learned positions only once."""

    def __init__(self, projector: Projector) -> None:
        self._projector = projector
        family, file = projector.family, projector.file
        has_positions = projector.hyperparameters.added_width > 0
        self._table = read_floats(file.tensor(POSITIONS)) if has_positions else None
        self._class_row: Float32 | None = None  # Input of the class row [1, channels].
        if family.class_place is not None:
            self._set_class_row(family.class_place)
        numbers = projector.images
        colours = np.arange(_COLOUR_VALUES, dtype=np.float64)[:, None] / (_COLOUR_VALUES - 1)
        normalized = (colours - np.array(numbers.mean)) / np.array(numbers.deviation)
        if projector.family.signed:
            normalized = 2 * normalized - 1
        self._normalized = normalized.T.astype(np.float32)  # [channels, colour values]

    def _set_class_row(self, place: int) -> None:
        """Reads the class row, removes its position from the table, and adds the patches' bias to the table."""
        assert self._table is not None
        tensors = self._projector.file.tensors
        row = read_floats(tensors[CLASS_ROW]) + self._table[place]
        pixels = self._projector.program.hidden.width - len(row)
        self._class_row = np.concatenate((np.zeros(pixels, np.float32), row))[None]
        self._table = np.delete(self._table, place, axis=0)
        if PATCH_BIAS in tensors:
            self._table = self._table + read_floats(tensors[PATCH_BIAS])

    def inputs(self, tile: NDArray[np.uint8]) -> EncoderInputs:
        """Converts a tile [height, width, 3] to an encoder's inputs. Raises RequestError for a wrong tile size."""
        projector = self._projector
        height, width, _ = tile.shape
        merged_rows = projector.rows_of(height, width)
        lines, columns = height // projector.patch_size, width // projector.patch_size
        order = self._order(lines, columns)
        patches = self._patches(tile, lines, columns, order.patches)
        places = np.stack(np.divmod(order.patches, columns)) + projector.family.first_place
        groups = order.windows
        if self._class_row is not None:
            patches, places, groups = self._with_class_row(self._class_row, patches, places)
        return EncoderInputs(
            patches=patches,
            rope_positions=np.ascontiguousarray(places, np.int32) if projector.family.turns else None,
            groups=groups,
            order=order,
            merged_rows=merged_rows,
        )

    def _with_class_row(self, class_row: Float32, patches: Float32, places: Int32) -> tuple[Float32, Int32, Int32]:
        """Appends the class row, and rows of zeros up to a whole merge group."""
        added, count = self._projector.hyperparameters.merged, len(patches) + 1
        ends = np.maximum(np.arange(count + added - 1) + 1, count)
        starts = np.where(ends > count, ends - 1, 0)
        patches = np.concatenate((patches, class_row, np.zeros((added - 1, patches.shape[1]), np.float32)))
        return patches, np.pad(places, ((0, 0), (0, added))), np.stack((starts, ends), axis=1).astype(np.int32)

    def _order(self, lines: int, columns: int) -> PatchOrder:
        projector = self._projector
        if not projector.family.windows:
            return in_groups(lines, columns, projector.merge)
        side = max(projector.images.window_pixels // projector.patch_size // projector.merge, 1)
        return in_windows(lines, columns, projector.merge, side)

    def _patches(self, tile: NDArray[np.uint8], lines: int, columns: int, order: Int32) -> Float32:
        size = self._projector.patch_size
        parts = tile.reshape(lines, size, columns, size, CHANNELS).transpose(0, 2, 4, 1, 3)
        numbers = parts.reshape(lines * columns, CHANNELS, size * size)
        added = self._added(lines, columns)
        patches = np.empty((len(order), self._projector.program.hidden.width), np.float32)
        for start in range(0, len(order), _PATCHES_AT_ONCE):
            places, out = (values[start : start + _PATCHES_AT_ONCE] for values in (order, patches))
            pixels = numbers[places]
            for channel, colours in enumerate(self._normalized):
                out[:, channel * size * size : (channel + 1) * size * size] = colours[pixels[:, channel]]
            if added is not None:
                out[:, CHANNELS * size * size :] = added[places]
        return patches

    def _added(self, lines: int, columns: int) -> Float32 | None:
        if self._table is None:
            return None
        rule = self._projector.family.positions
        if rule is Positions.AXES:
            return of_axes(self._table, lines, columns)
        return interpolated(self._table, lines, columns, rule)
