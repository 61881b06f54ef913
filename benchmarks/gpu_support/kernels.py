"""Times single matrix products on a GPU, also as a share of the bandwidth or 8-bit peak that `probe.limits` measures.

    python benchmarks/gpu_support/kernels.py                       # Q4_K, Q6_K, Q8_0 and F16, 1, 8 and 512 rows
    python benchmarks/gpu_support/kernels.py --types Q4_0 --rows 1 32

Products are launched from a CUDA graph. Together, their weights exceed the last-level cache. A line has the shape
(outputs x inputs), the rows, the microseconds, and the share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from statistics import median
from time import perf_counter

import numpy as np

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.config.environment import environment
from llamaclust.kernels.cuda import probe
from llamaclust.kernels.cuda.launches import matmul
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
from llamaclust.kernels.cuda.runtime.device import NULL, Device, Launch
from llamaclust.model.quant_types import ActivationFormat, QuantType

_SHAPES = ((4096, 4096), (22016, 4096), (4096, 11008))
_CACHE_BYTES = 256 << 20
_LAUNCHES, _REPEATS = 32, 7


def product_s(device: Device, kind: QuantType, shape: tuple[int, int], rows: int) -> tuple[float, int]:
    """Returns the seconds of a product and its weight bytes. Weights are random, because values do not change the
    time."""
    one = matmul.Weights(kind, shape)
    count = max(1, min(_LAUNCHES, _CACHE_BYTES // one.n_bytes + 1))
    source = np.random.default_rng(7)
    x_bytes = matmul.activation_bytes(one.activation, rows, shape[1])
    if one.activation is ActivationFormat.F32:
        x_bytes = 4 * rows * shape[1]
    with ExitStack() as held:
        sizes = count * one.n_bytes, x_bytes, 4 * rows * shape[0], 4
        weights, x, out, rows_at = (held.enter_context(closing(device.allocate(size))) for size in sizes)
        noise = source.integers(0, 64, 1 << 24, np.uint8)
        for at in range(0, weights.n_bytes, len(noise)):
            device.upload(weights, at, noise[: weights.n_bytes - at])
        device.upload(x, 0, source.integers(0, 64, x_bytes, np.uint8))
        device.upload(rows_at, 0, np.array([rows], np.int32).view(np.uint8))
        given = RowCount(rows, rows_at.at())
        launches = [
            matmul.multiply(
                [matmul.Product(matmul.Weights(kind, shape, weights.at(number % count * one.n_bytes)), NULL, out.at())],
                x.at(),
                given,
                LaunchLimits.of(device),
            )
            for number in range(_LAUNCHES)
        ]
        device.prepare({launch.kernel for launch in launches})
        return _graph_s(device, launches) / _LAUNCHES, one.n_bytes


def _graph_s(device: Device, launches: Sequence[Launch]) -> float:
    def work() -> None:
        for launch in launches:
            device.launch(launch)

    work()
    device.synchronize()
    with closing(device.capture(work)) as graph:
        found = []
        for _ in range(_REPEATS):
            graph.launch()
            device.synchronize()
            begun_s = perf_counter()
            for _ in range(4):
                graph.launch()
            device.synchronize()
            found.append((perf_counter() - begun_s) / 4)
        return median(found)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q6_K", "Q8_0", "F16"], metavar="TYPE")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 512], metavar="N")
    given = parser.parse_args(arguments)
    with closing(CupyDevice(0, folder=environment().kernels_dir)) as device:
        read_bytes_s, macs_s = probe.limits(device)
        print(f"{device.name}: {read_bytes_s / 1e9:.0f} GB/s read, {macs_s / 1e12:.0f} T multiply-accumulates/s")
        for name in given.types:
            for shape in _SHAPES:
                for rows in given.rows:
                    seconds, weight_bytes = product_s(device, QuantType[name], shape, rows)
                    share = weight_bytes / seconds / read_bytes_s
                    peak = rows * shape[0] * shape[1] / seconds / macs_s
                    print(
                        f"{name:6} {shape[0]:6} x {shape[1]:6} rows {rows:4} {seconds * 1e6:9.1f} us  "
                        f"bandwidth {share:5.2f}  peak {peak:5.3f}",
                        flush=True,
                    )


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
