"""Facts about families of encoders. Neither the files nor the programs contain these facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction


class Positions(Enum):
    """The learned positions that are added to patches. TABLE has a row for each patch of a tile of fixed size.
    BILINEAR_CORNERS, ANTIALIASED and BICUBIC are square tables that are interpolated to the tile's size. AXES has a
    table for columns and a table for lines."""

    NONE = auto()
    TABLE = auto()
    BILINEAR_CORNERS = auto()
    ANTIALIASED = auto()
    BICUBIC = auto()
    AXES = auto()


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """A family of encoders. `emit` appends the steps to a builder and returns the buffer with the result.

    merge_key, merge: the key for the side of a merge group in patches, and its default (None: the key is required).
    gelu, plain: the activations of files with `use_gelu`, and of files with neither `use_gelu` nor `use_silu`.
    turns: the program has RoPE by line and column. windows: the program has attention in windows.
    bidirectional: rows of the same image attend to each other in the text model.
    sections: the text model's RoPE uses the line and column of an image's rows (M-RoPE).
    tokens: minimum and maximum number of rows of an image of free size. If None, all tiles have the file's size.
    class_place: the index of the class row in the table of positions (see `classes`). If None, there is no class row.
    first_place: the position of the first line and column in RoPE. The class row has position 0.
    pads: images of free size are padded to whole merge groups.
    signed: a normalized colour c becomes 2 c - 1.
    transposed: tensors that files store in another order. True marks a convolution of a merge group, whose shape is
        [out, channels, height, width].
    as_row: vectors that the program reads as matrices of one row.
    unread: tensors that llama.cpp needs. Programs do not read them, because the text model has them too."""

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
