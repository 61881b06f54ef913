"""Launches of matrix products. Activations are quantized once for all products that read them. Results have the same
bits as on the CPU (docs/internals/numerics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import numpy as np

from llamaclust.kernels.cuda.launches.elementwise import GatedInputs
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL, Launch, Scalar
from llamaclust.model.quant_types import TILE_ROWS, ActivationFormat, QuantType

_Q = QuantType
_MODULES = {
    "matmul.float": (_Q.F32, _Q.F16, _Q.BF16),
    "matmul.simple": (_Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q8_0, _Q.IQ4_NL, _Q.MXFP4),
    "matmul.k": (_Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K, _Q.IQ4_XS, _Q.TQ2_0, _Q.TQ1_0),
    "matmul.grid": (_Q.IQ1_S, _Q.IQ1_M, _Q.IQ2_XXS, _Q.IQ2_XS, _Q.IQ2_S, _Q.IQ3_XXS, _Q.IQ3_S),
}
_MODULE_OF = {kind: module for module, kinds in _MODULES.items() for kind in kinds}

_SUB_BLOCKS = {
    **dict.fromkeys((_Q.Q4_K, _Q.Q5_K, _Q.IQ4_XS, _Q.IQ2_XXS, _Q.IQ3_XXS, _Q.IQ3_S), 8),
    **dict.fromkeys((_Q.Q2_K, _Q.Q3_K, _Q.Q6_K, _Q.IQ1_S, _Q.IQ1_M, _Q.IQ2_XS, _Q.IQ2_S), 16),
}
"""The number of integer scales in a segment, for quant types that have such scales."""

_GROUP_ROWS, _GEMM_ROWS, _WIDE_ROWS = 8, 64, 128
_WIDE_WARPS, _ENOUGH = 8, 0.9
"""The number of warps in a wide block, which has `_WIDE_ROWS` rows, and the minimum number of wide blocks per
multiprocessor."""
LEAST_PIECE = _GROUP_ROWS
"""The smallest value of `Experts.piece`, which decides how many items the buffers must hold."""
_GROUP_BYTES = {ActivationFormat.Q8_32: 320, ActivationFormat.Q8_256: 2336}
"""Bytes of one segment of eight quantized rows (src/matmul/activations.cuh)."""

_PIECE_SEGMENTS = {ActivationFormat.Q8_32: 4, ActivationFormat.Q8_256: 1}
"""The number of segments in a piece. A warp copies and multiplies one piece at a time (src/matmul/pieces.cuh)."""
_LONG_PIECE_BYTES = 1536
"""A warp has memory for two pieces if a piece is longer than this, otherwise for three. Unused for bulk copies."""
_MATRIX_UNITS, _ASYNCHRONOUS, _BULK, _HOPPER = (7, 5), (8, 0), (9, 0), (9, 0)
"""The oldest compute capabilities with 8-bit matrix instructions, with asynchronous copies, and with bulk copies. Only
`_HOPPER` has matrix instructions for four warps (src/matmul/wgmma.cuh)."""
_ARRIVAL_BYTES, _OTHERS_PART = 8, 7
"""Bytes of a bulk copy's barrier. 1 / `_OTHERS_PART` of the shared memory stays free for concurrent kernels."""
_GEMM_STAGES = 3
_KEPT_BYTES, _TERM_BYTES, _TURN_PIECE_BYTES = 2560, 16, 3072
"""Bytes of a warp's memory for terms (products to be added), of one term, and of the longest piece with terms."""
_STATIC_BYTES, _RESERVED_BYTES = 576, 1024
_TEAM_ROWS, _TEAM_WARPS, _STAGE_BYTES = 2, 4, 8192
"""Limits for float weights (float_teams.cuh): rows of a team with one warp, warps of a block, and bytes of a stage."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A tensor in GPU memory: a float32 vector, a matrix [rows, cols] in tiles, or one such matrix for each expert."""

    quant_type: QuantType
    shape: tuple[int, ...]
    address: np.uint64 = NULL  # Address of the first byte; 0 during planning.

    @property
    def n_bytes(self) -> int:
        return 4 * self.shape[0] if len(self.shape) == 1 else prod(self.shape[:-2]) * self.matrix_bytes

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def activation(self) -> ActivationFormat:
        activation = self.quant_type.info.activation
        assert activation is not None
        return activation

    @property
    def tile_count(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def tile_bytes(self) -> int:
        return self.quant_type.info.tile_bytes(self.cols)

    @property
    def matrix_bytes(self) -> int:
        return self.tile_count * self.tile_bytes

    @property
    def pieces(self) -> int:
        return -(-(self.cols // self.quant_type.info.block_size) // _PIECE_SEGMENTS[self.activation])


@dataclass(frozen=True, slots=True)
class Product:
    weights: Weights
    bias: np.uint64
    out: np.uint64


MOST_PRODUCTS = 3
"""The maximum number of products in one launch. They have the same quant type and width."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The lines of a launch, grouped by expert. A line is a row together with one of its experts."""

    items: np.uint64  # (expert, index of the first line in `lines`, number of lines) of each item.
    item_count: np.uint64
    lines: np.uint64
    max_items: int
    piece: int  # Maximum number of lines of an item.
    divisor: int  # Line l reads row l // divisor of the activations, and writes row l of the result.
    bias_rows: int = 1  # Number of rows in a tile of biases, which are stored column by column.


def expert_piece(lines: int, experts: int) -> int:
    return _GEMM_ROWS if lines > 2 * _GROUP_ROWS * experts else _GROUP_ROWS


def kernel_name(kind: str, quant_type: QuantType) -> str:
    return f"{_MODULE_OF[quant_type]}.{kind}_{quant_type.name}"


def activation_bytes(activation: ActivationFormat, rows: int, cols: int) -> int:
    if activation is ActivationFormat.F32:
        return 0
    return -(-rows // _GROUP_ROWS) * (cols // int(activation)) * _GROUP_BYTES[activation]


def quantize(
    activation: ActivationFormat,
    x: np.uint64,
    cols: int,
    rows: RowCount,
    out: np.uint64,
) -> Launch:
    return _quantize("rows", activation, (x,), cols, rows, out)


def quantize_gated(activation: ActivationFormat, x: GatedInputs, cols: int, rows: RowCount, out: np.uint64) -> Launch:
    return _quantize(x.kernel, activation, (x.gate, x.up, np.int32(x.stride)), cols, rows, out)


def _quantize(
    name: str, activation: ActivationFormat, inputs: tuple[Scalar, ...], cols: int, rows: RowCount, out: np.uint64
) -> Launch:
    grid = (-(-rows.bucket // _GROUP_ROWS), -(-cols // 256), 1)
    args = (*inputs, np.int32(cols), rows.address, np.int32(rows.multiple), out)
    return Launch(f"elementwise.quantize.{name}_{activation.value}", grid, (256, 1, 1), args)


def embed(weights: Weights, ids: np.uint64, rows: RowCount, out: np.uint64) -> Launch:
    args = (ids, weights.address, np.int32(weights.tile_bytes), np.int32(weights.cols), rows.address, out)
    grid = (-(-weights.cols // 1024), rows.bucket, 1)
    return Launch(kernel_name("embed", weights.quant_type), grid, (256, 1, 1), args)


def multiply(products: Sequence[Product], activations: np.uint64, rows: RowCount, gpu: LaunchLimits) -> Launch:
    piece = _gemm_rows(products, rows.bucket, gpu) if _takes_gemm(products, rows.bucket, gpu.sms) else _GROUP_ROWS
    experts = Experts(NULL, NULL, NULL, -(-rows.bucket // piece), piece, 1)
    return _launch(products, activations, RowCount(min(rows.bucket, piece), rows.address), experts, gpu)


def multiply_experts(
    products: Sequence[Product], activations: np.uint64, experts: Experts, gpu: LaunchLimits
) -> Launch:
    return _launch(products, activations, RowCount(experts.piece, NULL), experts, gpu)


def _blocks(products: Sequence[Product], tiles: int) -> int:
    return sum(-(-product.weights.tile_count // tiles) for product in products)


def _takes_gemm(products: Sequence[Product], rows: int, sms: int) -> bool:
    """True if the gemm kernel is faster than gemv. With 32 rows or fewer, its blocks must fill the GPU."""
    if rows <= _GROUP_ROWS:
        return False
    return rows > 4 * _GROUP_ROWS or _blocks(products, 4) * -(-rows // _GEMM_ROWS) >= 2 * sms


def _gemm_rows(products: Sequence[Product], rows: int, gpu: LaunchLimits) -> int:
    """Returns the rows per block: `_WIDE_ROWS` if nearly all multiprocessors then get a block, else `_GEMM_ROWS`."""
    if gpu.compute_capability != _HOPPER or products[0].weights.activation is ActivationFormat.F32:
        return _GEMM_ROWS
    wide_blocks = _blocks(products, _WIDE_WARPS) * -(-rows // _WIDE_ROWS)
    return _WIDE_ROWS if rows > _GEMM_ROWS and wide_blocks >= _ENOUGH * gpu.sms else _GEMM_ROWS


def _launch(
    products: Sequence[Product], activations: np.uint64, rows: RowCount, experts: Experts, gpu: LaunchLimits
) -> Launch:
    weights, is_gemm = products[0].weights, experts.piece > _GROUP_ROWS
    matrix_bytes = 0 if experts.items == NULL else weights.matrix_bytes
    args: tuple[Scalar, ...] = (
        *_matrices(products),
        *map(np.int32, (weights.tile_bytes, matrix_bytes, weights.cols)),
        *(activations, rows.address, experts.items, experts.item_count, experts.lines),
        *map(np.int32, (experts.divisor, experts.bias_rows)),
    )
    is_wide = experts.piece > _GEMM_ROWS
    name = kernel_name("gemm_wide" if is_wide else "gemm" if is_gemm else "gemv", weights.quant_type)
    items = experts.max_items
    times = 1 if experts.items == NULL else 4  # More blocks, because there may be fewer items than `items`.
    if weights.activation is ActivationFormat.F32:
        if is_gemm or gpu.compute_capability < _BULK:
            grid = items, _blocks(products, 4 if is_gemm else 1), 1
            return Launch(name, grid, (256 if is_gemm else 128, 1, 1), args)
        teams = _TeamsShape.of(products, rows.bucket, items, times, gpu)
        return Launch(name, (items, teams.blocks, 1), (32 * teams.warps, teams.count, 1), args, teams.shared_bytes)
    if is_gemm:
        warps = _WIDE_WARPS if is_wide else _gemm_warps(products, items, gpu)
        shared = _gemm_shared_bytes(weights, experts.piece, warps, gpu)
        return Launch(name, (items, _blocks(products, warps), 1), (32 * warps, 1, 1), args, shared)
    shape = _GemvShape.of(products, items, times, gpu, rows.bucket)
    turn = np.int32(_turn(weights, rows.bucket, gpu))
    return Launch(name, (items, shape.blocks, 1), (32 * shape.warps, 1, 1), (*args, turn), shape.shared_bytes)


def _matrices(products: Sequence[Product]) -> tuple[Scalar, ...]:
    assert len({(product.weights.quant_type, product.weights.cols) for product in products}) == 1
    assert len(products) <= MOST_PRODUCTS
    args: list[Scalar] = []
    for product in products:
        args += (product.weights.address, np.int32(product.weights.rows), product.bias, product.out)
    return (*args, *(MOST_PRODUCTS - len(products)) * (NULL, np.int32(0), NULL, NULL))


@dataclass(frozen=True, slots=True)
class _GemvShape:
    blocks: int
    warps: int
    shared_bytes: int

    @classmethod
    def of(cls, products: Sequence[Product], items: int, times: int, gpu: LaunchLimits, rows: int) -> Self:
        weights, tiles = products[0].weights, _blocks(products, 1)
        shape = _bulk_shape if gpu.compute_capability >= _BULK else _plain_shape
        kept_bytes = _KEPT_BYTES if _turn(weights, rows, gpu) > 1 else 0
        warps, stages, stage_bytes, blocks = shape(_piece_bytes(weights), kept_bytes, gpu)
        blocks = min(tiles, max(1, times * gpu.sms * blocks // items))
        if gpu.compute_capability >= _BULK:
            stages = min(stages, -(-(-(-tiles // blocks) * weights.pieces) // warps))
        return cls(blocks, warps, warps * (stages * stage_bytes + kept_bytes))


def _turn(weights: Weights, rows: int, gpu: LaunchLimits) -> int:
    """Returns how many pieces a warp multiplies before it adds the products. The products must fit in shared memory."""
    if gpu.compute_capability < _BULK or weights.activation is not ActivationFormat.Q8_256:
        return 1
    if _piece_bytes(weights) > _TURN_PIECE_BYTES:
        return 1
    outputs = 1 if rows == 1 else 4
    return min(1 + _KEPT_BYTES // (32 * _TERM_BYTES * outputs), -(-weights.pieces // 8))


def _piece_bytes(weights: Weights) -> int:
    info = weights.quant_type.info
    return _PIECE_SEGMENTS[weights.activation] * TILE_ROWS * (info.block_bytes + info.tile_extra_bytes)


def _plain_shape(piece_bytes: int, _: int, gpu: LaunchLimits) -> tuple[int, int, int, int]:
    """Returns the number of warps in a block, the number of copy buffers of a warp, the bytes of a copy buffer, and the
    number of blocks that a multiprocessor runs at the same time."""
    stages = 2 if piece_bytes > _LONG_PIECE_BYTES else 3
    stages = stages if gpu.compute_capability >= _ASYNCHRONOUS else 1
    of_registers = 5 if gpu.compute_capability >= _MATRIX_UNITS else 4
    block_bytes = 4 * stages * piece_bytes + _STATIC_BYTES + _RESERVED_BYTES
    of_shared = (gpu.shared_bytes + _RESERVED_BYTES) // block_bytes
    return 4, stages, piece_bytes, max(1, min(of_registers, of_shared))


def _bulk_shape(piece_bytes: int, kept_bytes: int, gpu: LaunchLimits) -> tuple[int, int, int, int]:
    """Returns the same values as `_plain_shape`, for GPUs with bulk copies."""
    stage_bytes = piece_bytes + _ARRIVAL_BYTES
    room = gpu.shared_bytes + _RESERVED_BYTES - gpu.shared_bytes // _OTHERS_PART
    own = _STATIC_BYTES + _RESERVED_BYTES + 8 * kept_bytes
    fit = {blocks: (room // blocks - own) // (8 * stage_bytes) for blocks in (1, 2)}
    blocks = 2 if fit[2] >= 2 else 1
    return 8, fit[blocks], stage_bytes, blocks


@dataclass(frozen=True, slots=True)
class _TeamsShape:
    blocks: int
    count: int
    warps: int
    shared_bytes: int

    @classmethod
    def of(cls, products: Sequence[Product], rows: int, items: int, times: int, gpu: LaunchLimits) -> Self:
        weights, tiles = products[0].weights, _blocks(products, 1)
        warps = 1 if rows <= _TEAM_ROWS else 2
        columns = _STAGE_BYTES // (TILE_ROWS * weights.quant_type.info.block_bytes)
        activations = warps * warps * 2 * 2 * 4 * (columns + 4)
        # Half of the shared memory that kernels may use. The next kernel can then load its first stages while this one
        # ends.
        room = gpu.shared_bytes * (_OTHERS_PART // 2) // _OTHERS_PART - _RESERVED_BYTES

        def stages(teams: int) -> int:
            return (room // teams - activations) // (_STAGE_BYTES + 2 * _ARRIVAL_BYTES)

        wanted = min(_TEAM_WARPS // warps, -(-tiles * items // gpu.sms))
        teams = next((teams for teams in range(wanted, 1, -1) if stages(teams) >= 2), 1)
        blocks = min(-(-tiles // teams), max(1, times * gpu.sms // items))
        most = -(-tiles // (blocks * teams)) * -(-weights.cols // columns)
        ring = min(max(1, stages(teams)), most) * (_STAGE_BYTES + 2 * _ARRIVAL_BYTES)
        return cls(blocks, teams, warps, teams * (ring + activations))


def _gemm_warps(products: Sequence[Product], items: int, gpu: LaunchLimits) -> int:
    most = 12 if gpu.compute_capability == _HOPPER else 16
    return next((warps for warps in (most, 8) if _blocks(products, warps) * items >= gpu.sms), 4)


def _gemm_shared_bytes(weights: Weights, rows: int, warps: int, gpu: LaunchLimits) -> int:
    segments, info = 256 // weights.activation.value, weights.quant_type.info
    sub_blocks = _SUB_BLOCKS.get(weights.quant_type, 0)
    scales = warps * TILE_ROWS * 4 * (sub_blocks // 2 + 1) if sub_blocks else 0
    stage = rows // _GROUP_ROWS * segments * _GROUP_BYTES[weights.activation]
    if gpu.compute_capability != _HOPPER:
        return 2 * stage + scales
    stage += warps * segments * TILE_ROWS * (info.block_bytes + info.tile_extra_bytes)
    return min(_GEMM_STAGES, (gpu.shared_bytes - _STATIC_BYTES - scales) // stage) * stage + scales
