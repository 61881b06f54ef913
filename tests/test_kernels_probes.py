"""Probes: figures that this program itself cannot beat, in about the time asked for."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

from llamaclust.kernels import probes
from llamaclust.kernels.cpu import _native


def test_bandwidth_is_at_least_what_numpy_reads() -> None:
    """Give or take a busy machine. Both read 64 MiB or more, again and again: little memory has to be found."""
    x = np.ones(8 << 20, np.uint64)
    start = time.perf_counter()
    for _ in range(4):
        x.max()
    numpy_gb_s = 4 * x.nbytes / (time.perf_counter() - start) / 1e9
    assert _native.read_bandwidth(1, 0.2, 2) / 1e9 > 0.4 * numpy_gb_s


def test_peaks_are_plausible() -> None:
    int8, fma = probes.int8_peak(1, 0.05), probes.fma_peak(1, 0.05)
    assert all(math.isfinite(v) and v > 0.1 for v in (int8, fma))
    assert int8 >= 0.9 * fma  # an 8-bit lane is never slower than a float's


def test_measuring_leaves_other_python_threads_running() -> None:
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        probes.int8_peak(1, 0.3)
    finally:
        done.set()
        ticker.join()
    assert ticks >= 3


def test_machine_is_measured_quickly() -> None:
    probes.measure_machine(2)  # touches memory that the system may have to find first
    start = time.perf_counter()
    machine = probes.measure_machine(2)
    assert machine.read_gb_s > 0.1 and machine.int8_gmac_s > 0.1
    assert time.perf_counter() - start < 4.0  # half a second on an idle machine


@pytest.mark.parametrize(("threads", "seconds"), [(0, 1.0), (-1, 1.0), (1025, 1.0), (1, 0.0), (1, 61.0), (1, math.nan)])
def test_impossible_requests_are_refused(threads: int, seconds: float) -> None:
    for probe in (probes.read_bandwidth, probes.int8_peak, probes.fma_peak):
        with pytest.raises(ValueError, match=r"threads|seconds"):
            probe(threads, seconds)
