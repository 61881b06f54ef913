from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda.launches import matmul
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL, Launch, Scalar
from llamaclust.model.program import Moe
from llamaclust.model.steps.options import Gating

_GATINGS = tuple(Gating)
"""The gatings, in the order of their numbers in the kernel."""
_HEAD_LINES = 1024  # Number of pairs of a row and a head for one thread block.
_PIECE_CHANNELS = 1024  # Number of channels of a row for one thread block.


@dataclass(frozen=True, slots=True)
class ExpertBuffers:
    ids: np.uint64  # int32 [rows, used]
    weights: np.uint64  # float32 [rows, used]
    # int32 [rows * used]: row * used + index of the expert in `ids`, sorted by expert id.
    lines: np.uint64
    items: np.uint64  # int32 [max_items, 3]: expert, index of the first line in `lines`, number of lines.
    item_count: np.uint64  # int32


def choice_bytes(step: Moe, rows: int) -> int:
    """Returns the size in bytes of the chosen experts' ids. The routing weights have the same size."""
    return 4 * rows * step.used


def max_items(step: Moe, rows: int, piece: int) -> int:
    lines = rows * step.used
    return min(step.experts, lines) + lines // piece


def items_bytes(step: Moe, rows: int, piece: int) -> int:
    return 3 * 4 * max_items(step, rows, piece)


@dataclass(frozen=True, slots=True)
class RouterOutput:
    logits: np.uint64
    bias: np.uint64 = NULL
    scales: np.uint64 = NULL


def choose(step: Moe, router: RouterOutput, places: ExpertBuffers, rows: RowCount) -> Launch:
    options = step.options
    counts = map(np.int32, (step.experts, step.used, options.groups, options.used_groups))
    rule = np.int32(_GATINGS.index(options.gating)), np.int32(options.normalized), np.float32(options.scale)
    outs = rows.address, places.ids, places.weights
    args: tuple[Scalar, ...] = (router.logits, router.bias, router.scales, *counts, *rule, *outs)
    shared_bytes = 4 * 4 * (2 * (step.experts + options.groups) + step.used)
    return Launch("experts.choose", (-(-rows.bucket // 4), 1, 1), (128, 1, 1), args, shared_bytes=shared_bytes)


def group(step: Moe, places: ExpertBuffers, piece: int, rows: RowCount) -> Launch:
    used, experts, most = map(np.int32, (step.used, step.experts, piece))
    args = (places.ids, used, experts, most, rows.address, places.lines, places.items, places.item_count)
    return Launch("experts.group", (1, 1, 1), (512, 1, 1), args, shared_bytes=3 * 4 * step.experts)


def by_head(heads: int, places: matmul.Experts, rows: RowCount) -> Launch:
    lines = rows.address, places.lines, places.items, places.item_count
    args = (np.int32(heads), np.int32(places.piece), *lines)
    return Launch("experts.by_head", (-(-rows.bucket * heads // _HEAD_LINES), 1, 1), (256, 1, 1), args)


def weigh_inputs(step: Moe, x: np.uint64, places: ExpertBuffers, out: np.uint64, rows: RowCount) -> Launch:
    width = step.x.width
    args = (x, places.weights, np.int32(step.used), np.int32(width), rows.address, out)
    return Launch("experts.weigh", (-(-width // _PIECE_CHANNELS), rows.bucket, 1), (256, 1, 1), args)


def combine(step: Moe, x: np.uint64, places: ExpertBuffers, out: np.uint64, rows: RowCount) -> Launch:
    width, weights = step.out.width, NULL if step.options.weighs_inputs else places.weights
    args = (x, weights, np.int32(step.used), np.int32(width), rows.address, out)
    return Launch("experts.combine", (-(-width // _PIECE_CHANNELS), rows.bucket, 1), (256, 1, 1), args)
