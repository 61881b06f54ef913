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
    table for columns and a table for rows."""

    NONE = auto()
    TABLE = auto()
    BILINEAR_CORNERS = auto()
    ANTIALIASED = auto()
    BICUBIC = auto()
    AXES = auto()


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """A family of encoders. `emit` appends the steps to a builder and returns the buffer with the result.

    merge_key: the key for the side of a merge group in patches. merge: its default, or None if the key is required.
    gelu: the activation of files with `use_gelu`. plain: that of files with neither `use_gelu` nor `use_silu`.
    optional_positions: True if files without learned positions are valid.
    turns: True if the program has RoPE by row and column. windows: True if attention is divided into windows.
    bidirectional: True if rows of the same image attend to each other in the text model.
    sections: True if the text model's RoPE uses the row and column of each image token (M-RoPE).
    tokens: minimum and maximum number of rows of an image of free size. If None, all tiles have the file's size.
    class_place: the index of the class row in the table of positions (see `classes`). If None, there is no class row.
    first_place: the position of a tile's first row and column in RoPE. The class row has position 0.
    pads: True if images of free size are padded to whole merge groups.
    signed: True if each normalized colour c is replaced by 2 c - 1.
    transposed: names of tensors that the program reads transposed. The flag is True if the tensor is the convolution of
        a merge group, with the shape [out, channels, height, width], and False if it is a matrix.
    as_row: names of vectors that the program reads as matrices of one row.
    unused_keys: LLaVA's keys that old converters also wrote for this family, whose encoder does not use them.
    unread: names of tensors that llama.cpp needs. Programs do not read them, because the text model has them too."""

    emit: Callable[[VisionBuilder], Buffer]
    merge_key: str = "vision.projector.scale_factor"
    merge: int | None = None
    gelu: ActivationFunction = ActivationFunction.GELU_TANH
    plain: ActivationFunction = ActivationFunction.GELU_QUICK
    positions: Positions = Positions.NONE
    optional_positions: bool = False
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
    unused_keys: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
