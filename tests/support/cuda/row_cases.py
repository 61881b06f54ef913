"""CPU results of row steps, for tests of row kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llamaclust.kernels.cuda.runtime.device import Buffer as DeviceBuffer
from llamaclust.model.program import (
    Buffer,
    Slice,
    Step,
)
from support.arithmetic.single_steps import Weight, program_of, rows_at
from support.cuda.exact import Float32, on_cpu
from support.cuda.launching import Bench

ROWS, BUCKET = 11, 16


def rows_of(bench: Bench) -> DeviceBuffer:
    """Puts the number of rows without padding on the device; buffers have no memory for padding rows."""
    return bench.put(np.array([ROWS], np.int32))


def two_parts(width: int, step: Callable[[Buffer, Buffer], Step], x: Float32) -> Float32:
    """Returns the CPU's result of a step on both halves of x."""
    hidden, a, b = Buffer("x", 2 * width), Buffer("a", width), Buffer("b", width)
    program = program_of(hidden, b, Slice(hidden, a, 0), Slice(hidden, b, width), step(a, b))
    return on_cpu(program, {}, rows_at(range(ROWS)), x)


def one_part(width: int, step: Callable[[Buffer, Buffer], Step], x: Float32, **weights: Float32) -> Float32:
    hidden, out = Buffer("x", width), Buffer("out", width)
    program = program_of(hidden, out, step(hidden, out))
    return on_cpu(program, {name: Weight(values) for name, values in weights.items()}, rows_at(range(ROWS)), x)
