"""Rules for gathers, in which the members of a group exchange rows: the format of rows, and bands of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise, takewhile

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.backend import Float32
from llamaclust.model import program as ir
from llamaclust.model.groups.formats import format_of_readers
from llamaclust.model.quant_types import ActivationFormat, QuantType

_INT8_OF_FLOAT = 4
# `executor/workspace.h` and `executor/gatherer.h` have the same limits.
LEAST_BANDED_ROWS = 64
LEAST_ROWS_OF_BAND = 32
MOST_BANDS = 4
_TILE_ROWS = 16
_PACKED = (ActivationFormat.Q8_32, ActivationFormat.Q8_256)


def band_borders(program: ir.Program, rows: int, most: int) -> list[int]:
    """Divides a microbatch's rows into up to `most` bands, and returns their borders. Gathers run once per band."""
    before = takewhile(lambda step: not isinstance(step, ir.SelectRows), program.steps)
    is_whole = rows < LEAST_BANDED_ROWS or program.states or not program.is_causal
    if is_whole or not any(isinstance(step, ir.Gather) for step in before):
        return [0, rows]
    bands = min(most, rows // LEAST_ROWS_OF_BAND)
    inner = (rows * (3 * band - 1) // (3 * bands - 1) for band in range(1, bands))
    return [0, *((row + _TILE_ROWS // 2) // _TILE_ROWS * _TILE_ROWS for row in inner), rows]


def bands_of(program: ir.Program, rows: int, most: int) -> int:
    return len(band_borders(program, rows, most)) - 1


def borders_in(step: ir.Gather, width: int) -> list[int]:
    return [border * width // step.borders[-1] for border in step.borders]


def finite_members(step: ir.Gather, whole: Float32) -> list[bool]:
    """Returns True for each member whose columns are finite. Columns of int8 values are finite if their scales are."""
    form = next((form for form in _PACKED if packed_width(step.borders[-1], form) == whole.shape[1]), None)
    borders = borders_in(step, whole.shape[1])
    if form is not None:
        segment = packed_width(form.value, form)
        whole, borders = whole[:, segment - 1 :: segment], [border // segment for border in borders]
    is_finite: NDArray[np.bool_] = np.asarray(np.isfinite(whole).all(axis=0))
    return [bool(is_finite[start:end].all()) for start, end in pairwise(borders)]


def packed_width(columns: int, form: ActivationFormat) -> int:
    return columns // _INT8_OF_FLOAT + columns // form.value


def gather_formats(program: ir.Program, types: Mapping[str, QuantType]) -> Iterator[ActivationFormat | None]:
    """Yields the format in which each gather sends rows, in the order of steps. None means plain floats."""
    results = program.out, program.normed
    for at, step in enumerate(program.steps):
        if isinstance(step, ir.Gather):
            readers = program.steps[at + 1 :]
            form = None if step.is_of_one else format_of_readers(readers, step.out, results, types.__getitem__)
            has_whole_segments = form is not None and not any(border % form.value for border in step.borders)
            yield form if has_whole_segments else None
