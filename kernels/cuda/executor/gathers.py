"""Gathers rows for a group member on a GPU. Members on CPUs send the same bytes in the same order."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cuda.executor.host_steps import HostStep
from llamaclust.kernels.gathers import band_borders, packed_width
from llamaclust.model.program import Gather, Program
from llamaclust.model.quant_types import ActivationFormat

if TYPE_CHECKING:
    from llamaclust.kernels._native import Gatherer

_LEAST = np.float32(2.0**-118)
_MOST_QUANT = np.float32(127)
_MOST = np.finfo(np.float32).max


def gather_rows(
    gatherer: Gatherer, program: Program, host: HostStep, batch: Batch, own: Float32, whole: Float32
) -> None:
    """Fills `whole` with the rows of all members. Rows that were sent as int8 become floats."""
    step = host.step
    assert isinstance(step, Gather)
    places, borders, given = (
        band_borders(program, batch.rows, 1 if batch.groups is not None else gatherer.bands),
        list(step.borders),
        whole,
    )
    bands = len(places) - 1
    if host.form is not None:
        borders = [packed_width(border, host.form) for border in borders]
        own, given = pack(own, host.form), np.empty((len(own), borders[-1]), np.float32)
    for band, (begin, end) in enumerate(pairwise([0, len(own)] if host.selected else places)):
        gatherer.gather(host.number * bands + band, own[begin:end], given[begin:end], borders, step.to)
    if host.form is not None:
        whole[:] = unpack(given, host.form)


def pack(x: Float32, form: ActivationFormat) -> Float32:
    """Packs each segment as int8 values followed by their scale, like the native executor's `pack`."""
    columns = int(form)
    segments = x.reshape(len(x), -1, columns)
    top = np.abs(segments).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        quants = np.where(top < _LEAST, np.float32(0), np.rint(segments * (_MOST_QUANT / top)))
        scales = np.where(top < _LEAST, np.float32(0), top / _MOST_QUANT)
    lost = ~np.isfinite(top)
    quants, scales = np.where(lost, np.float32(0), quants), np.where(lost, np.float32(np.nan), scales)
    packed = np.concatenate([quants.astype(np.int8).view(np.float32), scales], axis=-1)
    return np.ascontiguousarray(packed.reshape(len(x), -1))


def unpack(packed: Float32, form: ActivationFormat) -> Float32:
    """Returns floats. Quantizing them gives the packed values again."""
    # ((m / 127) * 127) / 127 = m / 127 for every float m.
    segments = packed.reshape(len(packed), -1, int(form) // 4 + 1)
    quants = np.ascontiguousarray(segments[..., :-1]).view(np.int8)
    with np.errstate(over="ignore"):
        found: Float32 = np.clip(quants * segments[..., -1:], -_MOST, _MOST).reshape(len(packed), -1)
    return found
