from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES, Launch, Scalar
from llamaclust.model.program import Join, LayerNorm, PositionScale, RmsNorm, Rope, RopeTable, SigmoidGate, Slice
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import ActivationFunction, GatedActivation, RopeStyle

_BLOCK = 256
_BLOCK_CHANNELS = 1024
_HEADS_PER_BLOCK = 8
_ROTATION_BLOCK = 64
# Channels of a warp (four for each lane), and the maximum number of warps in a block.
_WARP_CHANNELS, _MAX_WARPS = 128, 32

WIDEST_ROW = PLAIN_SHARED_BYTES // 4 - 16
"""The maximum width of a row for `add_rms_norm`."""

_GATED = {GatedActivation.GELU_MUL: f"{ActivationFunction.GELU_TANH}_mul"}


@dataclass(frozen=True, slots=True)
class GatedInputs:
    """The float32 inputs of the gated activation `kernel`. `stride` is the distance between rows, in elements."""

    kernel: str
    gate: np.uint64
    up: np.uint64
    stride: int


def gated_kernel(activation: GatedActivation) -> str:
    return _GATED.get(activation, activation)


def _launch(kernel: str, blocks: int, rows: RowCount, args: tuple[Scalar, ...], block: int = _BLOCK) -> Launch:
    return Launch(f"elementwise.{kernel}", (blocks, rows.bucket, 1), (block, 1, 1), args)


def _blocks(width: int) -> int:
    return -(-width // _BLOCK_CHANNELS)


def elementwise(name: str, inputs: tuple[Scalar, ...], out: np.uint64, width: int, rows: RowCount) -> Launch:
    return _launch(f"rows.{name}_rows", _blocks(width), rows, (*inputs, np.int32(width), rows.address, out))


def gated_lines(x: GatedInputs, width: int, rows: RowCount, out: np.uint64) -> Launch:
    figures = np.int32(x.stride), np.int32(width), rows.address, np.int32(rows.multiple)
    args = (x.gate, x.up, *figures, out)
    return Launch(f"elementwise.rows.{x.kernel}_lines", (rows.bucket, _blocks(width), 1), (_BLOCK, 1, 1), args)


def slice_rows(step: Slice, x: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    x_width, width = step.x.width // step.heads, step.out.width // step.heads
    figures = map(np.int32, (x_width, step.start, width, step.heads))
    return _launch("rows.slice", _blocks(step.out.width), rows, (x, *figures, rows.address, out))


def join_rows(step: Join, x: np.uint64, y: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    figures = map(np.int32, (step.x.width // step.heads, step.y.width // step.heads, step.heads))
    return _launch("rows.join", _blocks(step.out.width), rows, (x, y, *figures, rows.address, out))


def scale_by_position(
    step: PositionScale, x: np.uint64, factors: np.uint64, positions: np.uint64, out: np.uint64, rows: RowCount
) -> Launch:
    figures = np.int32(step.offset), np.int32(step.length), np.int32(step.out.width)
    args = (x, factors, positions, *figures, rows.address, out)
    return _launch("rows.scale_by_position_rows", _blocks(step.out.width), rows, args)


def select_rows(x: np.uint64, output_rows: np.uint64, out: np.uint64, width: int, rows: RowCount) -> Launch:
    args = (x, np.int32(width), output_rows, rows.address, out)
    return _launch("rows.select_rows", _blocks(width), rows, args)


def rms_norm(step: RmsNorm, x: np.uint64, weight: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    epsilon, width = np.float32(step.epsilon), np.int32(step.width)
    if step.own_weights:
        tile_bytes = np.int32(QuantType.F32.info.tile_bytes(step.width))
        return _launch(
            "norms.rms_norm_groups", step.heads, rows, (x, weight, tile_bytes, epsilon, width, rows.address, out)
        )
    if step.heads == 1:
        return _launch("norms.rms_norm", 1, rows, (x, weight, epsilon, width, rows.address, out))
    args = (x, weight, epsilon, np.int32(step.heads), width, rows.address, out)
    return _launch("norms.rms_norm_parts", -(-step.heads // _HEADS_PER_BLOCK), rows, args)


def add_rms_norm(
    step: RmsNorm,
    inputs: tuple[np.uint64, np.uint64],
    weight: np.uint64,
    total: np.uint64,
    outs: tuple[np.uint64, np.uint64, np.uint64],
    rows: RowCount,
) -> Launch:
    """Writes the sum of the two `inputs` to `total`. Writes the norm of the sum to the three `outs`: as float32, and
    quantized in segments of 32 and of 256. Address 0 means no second input, or an output that is not wanted."""
    args = (*inputs, weight, np.float32(step.epsilon), np.int32(step.width), rows.address, total, *outs)
    threads = 32 * min(_MAX_WARPS, -(-step.width // _WARP_CHANNELS))
    return Launch("elementwise.norms.add_rms_norm", (1, rows.bucket, 1), (threads, 1, 1), args, 4 * step.width)


def layer_norm(
    step: LayerNorm, x: np.uint64, weight: np.uint64, bias: np.uint64, out: np.uint64, rows: RowCount
) -> Launch:
    args = (x, weight, bias, np.float32(step.epsilon), np.int32(step.out.width), rows.address, out)
    return _launch("norms.layer_norm", 1, rows, args)


def sigmoid_gate(
    step: SigmoidGate, x: np.uint64, weight: np.uint64, y: np.uint64, out: np.uint64, rows: RowCount
) -> Launch:
    args = (x, weight, y, np.int32(step.x.width), np.int32(step.out.width), rows.address, out)
    return _launch("norms.sigmoid_gate", 1, rows, args)


def rotation(table: RopeTable, positions: np.uint64, frequencies: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    pairs = len(table.frequencies)
    args = (positions, frequencies, np.float64(table.scale), np.int32(pairs), rows.address, out)
    return _launch("rope.rotation", -(-pairs // _ROTATION_BLOCK), rows, args, _ROTATION_BLOCK)


def rotation_in_sections(
    table: RopeTable,
    positions: np.uint64,
    max_rows: int,
    sections: np.uint64,
    frequencies: np.uint64,
    out: np.uint64,
    rows: RowCount,
) -> Launch:
    """Computes the RoPE angles of channel pairs. Each pair uses the positions of its section. `positions` is [sections,
    max_rows]."""
    pairs = len(table.frequencies)
    figures = np.float64(table.scale), np.int32(pairs)
    args = (positions, np.int32(max_rows), sections, frequencies, *figures, rows.address, out)
    return _launch("rope.rotation_in_sections", -(-pairs // _ROTATION_BLOCK), rows, args, _ROTATION_BLOCK)


def copy_rows(x: np.uint64, out: np.uint64, width: int, rows: RowCount) -> Launch:
    figures = map(np.int32, (width, 0, width, 1))
    return _launch("rows.slice", _blocks(width), rows, (x, *figures, rows.address, out))


def rope(step: Rope, x: np.uint64, angles: np.uint64, rows: RowCount) -> Launch:
    pairs = len(step.table.frequencies)
    neox = np.int32(step.style is RopeStyle.NEOX)
    args = (x, angles, np.int32(step.heads), np.int32(step.head_dim), np.int32(pairs), neox, rows.address)
    return _launch("rope.rope", -(-step.heads * pairs // _BLOCK), rows, args)
