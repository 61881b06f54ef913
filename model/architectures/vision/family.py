"""The facts of a family of encoders that are neither in its files nor in its program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction


class Positions(Enum):
    """The learned positions added to patches. NONE: there are none. TABLE: a row for each patch of a tile of fixed
    size. BILINEAR_CORNERS, ANTIALIASED, BICUBIC: a square table, interpolated to the tile's size. BILINEAR_CORNERS
    keeps the corners in place, ANTIALIASED has wider weights where the tile is smaller than the table, and BICUBIC has
    PyTorch's kernel (a = -0.75). AXES: a table for columns and one for lines."""

    NONE = auto()
    TABLE = auto()
    BILINEAR_CORNERS = auto()
    ANTIALIASED = auto()
    BICUBIC = auto()
    AXES = auto()


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """A family of encoders. `emit` appends the steps to a builder and returns the buffer with the result.

    merge_key, merge: the key with the number of patches a side that become one row, and its default (None: required).
    gelu, plain: the functions of files with `use_gelu`, and with neither `use_gelu` nor `use_silu`.
    turns, windows: the program has rotations by height and width, or attention in windows.
    bidirectional: the text model's rows of an image see each other.
    sections: the text model turns by the line and column of an image's rows (M-RoPE).
    tokens: the least and the most rows of an image, where its size is free; None: all tiles have the file's size.
    class_place: the row of the table of positions that is for the class row (see `classes`); None: there is none.
    first_place: the number by which the first line and column turn. The class row turns by 0.
    pads: images whose size is free are padded to whole merge groups.
    signed: a normalized colour c becomes 2 c - 1.
    transposed: tensors in the other order in files; True: convolutions [out, channels, height, width] of a merge group.
    as_row: vectors that the program reads as matrices of one row.
    unread: tensors that llama.cpp needs, and that are part of the text model too."""

    emit: Callable[[VisionBuilder], Buffer]
    merge_key: str = "vision.projector.scale_factor"
    merge: int | None = None
    gelu: ActivationFunction = ActivationFunction.GELU_TANH
    plain: ActivationFunction = ActivationFunction.GELU_QUICK
    positions: Positions = Positions.NONE
    turns: bool = False
    windows: bool = False
    bidirectional: bool = False
    sections: bool = False
    tokens: tuple[int, int] | None = None
    class_place: int | None = None
    first_place: int = 0
    pads: bool = False
    signed: bool = False
    transposed: tuple[tuple[str, bool], ...] = ()
    as_row: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
