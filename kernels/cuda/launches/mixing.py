from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llamaclust.kernels.cuda.launches.elementwise import elementwise
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL, Launch, Scalar
from llamaclust.model.steps.rows import GaussianTopK, MatchMagnitude, MeanRows, Mix, ScaleByWeight

_BLOCK = 256
_BLOCK_CHANNELS = 1024
_PARTS_PER_BLOCK = 8


def _launch(kernel: str, blocks: int, rows: RowCount, args: tuple[Scalar, ...]) -> Launch:
    return Launch(f"elementwise.mixing.{kernel}", (blocks, rows.bucket, 1), (_BLOCK, 1, 1), args)


def scale_by_weight(step: ScaleByWeight, x: np.uint64, weight: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    width = step.out.width
    if not step.by_channel:
        return elementwise("scale_by_weight", (x, weight), out, width, rows)
    args = (x, weight, np.int32(width), rows.address, out)
    return _launch("scale_channels", -(-width // _BLOCK_CHANNELS), rows, args)


def mix(step: Mix, reads: Sequence[np.uint64], out: np.uint64, rows: RowCount) -> Launch:
    x, y, coefficients = (*reads, NULL)[:3]
    x_parts, parts = np.int32(step.x.width // step.width), np.int32(step.out.width // step.width)
    figures = np.float32(step.offset), np.int32(step.width), np.int32(step.first), x_parts, parts
    args = (x, y, coefficients, *figures, rows.address, out)
    return _launch("mix", -(-step.out.width // _BLOCK_CHANNELS), rows, args)


def mean_rows(step: MeanRows, x: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    figures = np.int32(step.factor), np.float32(1) / np.float32(step.factor), np.int32(step.out.width)
    return _launch("mean_parts", -(-step.out.width // _BLOCK_CHANNELS), rows, (x, *figures, rows.address, out))


def match_magnitude(step: MatchMagnitude, x: np.uint64, y: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    parts = step.x.width // step.y.width
    args = (x, y, np.float32(step.epsilon), np.int32(parts), np.int32(step.y.width), rows.address, out)
    return _launch("match_magnitude", -(-parts // _PARTS_PER_BLOCK), rows, args)


def gaussian_top_k(step: GaussianTopK, x: np.uint64, out: np.uint64, rows: RowCount) -> Launch:
    return _launch("gaussian_top_k", 1, rows, (x, np.float32(step.factor), np.int32(step.out.width), rows.address, out))
