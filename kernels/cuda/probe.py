"""Measures the speed of matrix products on a GPU and the peak rates of reads and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from time import perf_counter

import numpy as np

from llamaclust.kernels.cuda.launches import matmul
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL, Buffer, Device, Launch, Scalar
from llamaclust.model.quant_types import QuantType

_KIND = QuantType.Q4_0
_COLS = 4096
_TILES_AN_SM = 16
"""Tiles of 16 rows for each multiprocessor. Two matrices with this many tiles exceed the last-level cache."""
_MANY_ROWS = 128
_BLOCK, _PIECE_BYTES = 256, 65536
_ROUNDS, _MACS = 1024, 8 * 16 * 32 * 8
_READ_BYTES = 1 << 30
_FLUSHED_BYTES = 256 << 20
"""A size that exceeds the last-level cache of any GPU (at most 126 MiB), in bytes."""
_SCALES = (1 / 1024, 1 / 64, 1 / 8, 1.0)
_LONG_S = 0.002
_REPEATED_S = 0.02

_Work = tuple[Sequence[Launch], float]


def measure(device: Device) -> tuple[float, float]:
    """Returns (weight bytes, multiply-accumulates) per second. Uses smaller matrices if little memory is free."""
    tile = matmul.Weights(_KIND, (16, _COLS))
    tile_bytes, x_bytes = tile.tile_bytes, matmul.activation_bytes(tile.activation, _MANY_ROWS, _COLS)
    room = (device.free_bytes // 2 - x_bytes) // (2 * tile_bytes + 4 * 16 * _MANY_ROWS)
    most = 16 * max(1, min(_TILES_AN_SM * device.sms, room))
    with ExitStack() as held:
        sizes = (2 * most // 16 * tile_bytes, x_bytes, 4 * most * _MANY_ROWS, 4)
        weights, x, out, count = (held.enter_context(closing(device.allocate(n_bytes))) for n_bytes in sizes)

        def product(index: int, rows: int, outputs: int) -> Launch:
            device.upload(count, 0, np.array([rows], np.int32).view(np.uint8))
            matrix = matmul.Weights(_KIND, (outputs, _COLS), weights.at(index * outputs // 16 * tile_bytes))
            return matmul.multiply(
                [matmul.Product(matrix, NULL, out.at())], x.at(), RowCount(rows, count.at()), LaunchLimits.of(device)
            )

        def outputs_at(scale: float) -> int:
            return 16 * max(1, int(most * scale) // 16)

        def one_row(scale: float) -> _Work:
            outputs = outputs_at(scale)
            return [product(index, 1, outputs) for index in range(2)], 2 * outputs // 16 * tile_bytes

        def many_rows(scale: float) -> _Work:
            outputs = outputs_at(scale)
            return [product(0, _MANY_ROWS, outputs)], _MANY_ROWS * outputs * _COLS

        return _rate(device, one_row), _rate(device, many_rows)


def limits(device: Device) -> tuple[float, float]:
    """Returns the peak rates of reads (bytes per second) and of multiply-accumulates on registers (per second)."""
    pieces, blocks = min(_READ_BYTES, device.free_bytes // 4) // _PIECE_BYTES, 8 * device.sms
    with closing(device.allocate(pieces * _PIECE_BYTES)) as memory, closing(device.allocate(4)) as out:

        def launch(kernel: str, blocks: int, *args: Scalar) -> list[Launch]:
            return [Launch(f"limits.{kernel}", (blocks, 1, 1), (_BLOCK, 1, 1), (*args, out.at()))]

        def read(scale: float) -> _Work:
            count = max(1, int(pieces * scale))
            return launch("read", min(count, blocks), memory.at(), np.int32(count)), count * _PIECE_BYTES

        def multiply(scale: float) -> _Work:
            rounds = int(_ROUNDS * scale)
            return launch("multiply", blocks, np.int32(rounds)), rounds * blocks * (_BLOCK // 32) * _MACS

        return _rate(device, read), _rate(device, multiply)


def _rate(device: Device, work_at: Callable[[float], _Work]) -> float:
    """Returns work per second, measured with the first of `_SCALES` that takes longer than `_LONG_S`."""
    for scale in _SCALES:
        work, amount = work_at(scale)
        # The first launch also loads the kernel, which takes milliseconds.
        taken_s = min(_taken_s(device, work, 1) for _ in range(2))
        if taken_s > _LONG_S:
            break
    if taken_s < _REPEATED_S:
        times = int(_REPEATED_S / taken_s) + 1
        taken_s = min(_taken_s(device, work, times) for _ in range(3))
    return amount / taken_s


def _taken_s(device: Device, work: Sequence[Launch], times: int) -> float:
    device.synchronize()
    begun_s = perf_counter()
    for _ in range(times):
        for launch in work:
            device.launch(launch)
    device.synchronize()
    return (perf_counter() - begun_s) / times


def allocate_flush(device: Device) -> Buffer:
    pieces = max(4, min(_FLUSHED_BYTES, device.free_bytes // 4) // _PIECE_BYTES)
    return device.allocate(pieces * _PIECE_BYTES)


def flush_cache(device: Device, memory: Buffer) -> None:
    """Fills the GPU's cache with other data, as reading all weights does. Takes about a millisecond."""
    args = memory.at(), np.int32(memory.n_bytes // _PIECE_BYTES), memory.at()
    device.launch(Launch("limits.read", (8 * device.sms, 1, 1), (_BLOCK, 1, 1), args))
    device.synchronize()
