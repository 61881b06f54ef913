"""Launches of row by row steps. `most`: lines of the bucket; `count`: where it stands how many there are."""

from __future__ import annotations

import numpy as np

from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES, Launch, Scalar
from llamaclust.model.program import GeluKind, Rope, RopeStyle

_BLOCK = 256
_PIECE = 1024
"""Channels that a block of an elementwise kernel computes."""
_PARTS = 8
_ROTATION_BLOCK = 64
_FOUR_EACH, _MOST_WARPS = 128, 32  # channels of a warp, four a lane; warps of a block

WIDEST_ROW = PLAIN_SHARED_BYTES // 4 - 16
"""Channels of a row that `add_rms_norm` can have."""


def _launch(kernel: str, blocks: int, most: int, args: tuple[Scalar, ...], block: int = _BLOCK) -> Launch:
    return Launch(kernel, (blocks, most, 1), (block, 1, 1), args)


def _pieces(width: int) -> int:
    return -(-width // _PIECE)


def elementwise(
    kernel: str, inputs: tuple[Scalar, ...], out: np.uint64, width: int, most: int, count: np.uint64
) -> Launch:
    """out = a function of `inputs`, buffers as wide and numbers."""
    return _launch(f"elementwise.rows.{kernel}", _pieces(width), most, (*inputs, np.int32(width), count, out))


def gelu(kind: GeluKind, x: np.uint64, out: np.uint64, width: int, most: int, count: np.uint64) -> Launch:
    name = "gelu_tanh_rows" if kind is GeluKind.TANH else "gelu_erf_rows"
    return elementwise(name, (x,), out, width, most, count)


def slice_of(x: np.uint64, x_width: int, start: int, out: np.uint64, width: int, most: int, count: np.uint64) -> Launch:
    args = (x, np.int32(x_width), np.int32(start), np.int32(width), count, out)
    return _launch("elementwise.rows.slice", _pieces(width), most, args)


def select_rows(
    x: np.uint64, output_rows: np.uint64, out: np.uint64, width: int, most: int, outputs: np.uint64
) -> Launch:
    return _launch(
        "elementwise.rows.select_rows", _pieces(width), most, (x, np.int32(width), output_rows, outputs, out)
    )


def rms_norm(
    x: np.uint64,
    weight: np.uint64,
    epsilon: float,
    heads: int,
    width: int,
    out: np.uint64,
    most: int,
    count: np.uint64,
) -> Launch:
    """`width`: of each of the `heads` parts of a line."""
    if heads == 1:
        return _launch(
            "elementwise.norms.rms_norm", 1, most, (x, weight, np.float32(epsilon), np.int32(width), count, out)
        )
    args = (x, weight, np.float32(epsilon), np.int32(heads), np.int32(width), count, out)
    return _launch("elementwise.norms.rms_norm_parts", -(-heads // _PARTS), most, args)


def add_rms_norm(
    x: np.uint64,
    y: np.uint64,
    weight: np.uint64,
    epsilon: float,
    width: int,
    total: np.uint64,
    outs: tuple[np.uint64, np.uint64, np.uint64],
    most: int,
    count: np.uint64,
) -> Launch:
    """total = x + y, or x alone where y is 0; its norm goes to `outs`, of which some may be 0: as float32, and in eight
    bits for weights with segments of 32 and of 256."""
    args = (x, y, weight, np.float32(epsilon), np.int32(width), count, total, *outs)
    warps = min(_MOST_WARPS, -(-width // _FOUR_EACH))
    return Launch("elementwise.norms.add_rms_norm", (1, most, 1), (32 * warps, 1, 1), args, 4 * width)


def layer_norm(
    x: np.uint64,
    weight: np.uint64,
    bias: np.uint64,
    epsilon: float,
    width: int,
    out: np.uint64,
    most: int,
    count: np.uint64,
) -> Launch:
    args = (x, weight, bias, np.float32(epsilon), np.int32(width), count, out)
    return _launch("elementwise.norms.layer_norm", 1, most, args)


def sigmoid_gate(
    x: np.uint64,
    x_width: int,
    weight: np.uint64,
    y: np.uint64,
    out: np.uint64,
    width: int,
    most: int,
    count: np.uint64,
) -> Launch:
    args = (x, weight, y, np.int32(x_width), np.int32(width), count, out)
    return _launch("elementwise.norms.sigmoid_gate", 1, most, args)


def rotation(
    positions: np.uint64,
    frequencies: np.uint64,
    scale: float,
    pairs: int,
    out: np.uint64,
    most: int,
    count: np.uint64,
) -> Launch:
    """Cosines and sines of every line, [most, 2 * pairs], from `frequencies` in float64."""
    args = (positions, frequencies, np.float64(scale), np.int32(pairs), count, out)
    return _launch("elementwise.rope.rotation", -(-pairs // _ROTATION_BLOCK), most, args, _ROTATION_BLOCK)


def rope(step: Rope, x: np.uint64, angles: np.uint64, most: int, count: np.uint64) -> Launch:
    """In place, by what `rotation` made of the step's table."""
    pairs = len(step.table.frequencies)
    neox = np.int32(step.style is RopeStyle.NEOX)
    args = (x, angles, np.int32(step.heads), np.int32(step.head_dim), np.int32(pairs), neox, count)
    return _launch("elementwise.rope.rope", -(-step.heads * pairs // _BLOCK), most, args)
