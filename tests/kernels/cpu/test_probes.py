"""Tests of hardware probes: rates that this program itself cannot exceed, measured in about the requested time."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llamaclust.kernels import _native, probes


def test_bandwidth_is_at_least_what_numpy_reads() -> None:
    """Both read at least 64 MiB repeatedly, which needs little memory. One of several rounds must succeed, since other
    programs use the machine."""
    x = np.ones(8 << 20, np.uint64)
    ratios = [0.0]
    while max(ratios) <= 0.4:
        assert len(ratios) < 10, ratios
        start = time.perf_counter()
        for _ in range(4):
            x.max()
        numpy_bytes_s = 4 * x.nbytes / (time.perf_counter() - start)
        ratios.append(_native.ReadProbe(1, 2).measure(0.2) / numpy_bytes_s)


@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth_is_that_of_the_bytes_that_were_read(threads: int) -> None:
    """The bytes read in the requested time are somewhat fewer than at the best pattern's speed. One of several rounds
    must succeed, since other programs use the machine."""
    ratios: list[float] = []
    while not any(0.85 < ratio < 1.7 for ratio in ratios):
        assert len(ratios) < 20, ratios
        probe = _native.ReadProbe(threads, 2)
        assert probe.bytes_read == 0
        ratios.append(probe.measure(0.2) * 0.2 / probe.bytes_read)


def test_peaks_are_plausible() -> None:
    """An 8-bit lane is never slower than a float lane. One of several rounds must show it, since others use the
    machine."""
    rounds: list[tuple[float, float]] = []
    while not any(int8 >= 0.9 * fma > 0.09 for int8, fma in rounds):
        assert len(rounds) < 20, rounds
        rounds.append((probes.int8_peak(1, 0.05), probes.fma_peak(1, 0.05)))
        assert all(map(math.isfinite, rounds[-1]))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the loops in assembly are for x86-64")
@pytest.mark.parametrize(
    ("function", "operations"),
    [
        ("int8_avx512vnni", ["vpdpbusd zmm"] * 24),
        ("int8_avxvnni", ["{vex} vpdpbusd ymm"] * 24),
        ("int8_avx512", ["vpmaddubsw zmm", "vpmaddwd zmm", "vpaddd zmm"] * 24),
        ("int8_avx2", ["vpmaddubsw ymm", "vpmaddwd ymm", "vpaddd ymm"] * 24),
        ("fma_avx512", ["vfmadd231ps zmm"] * 24),
        ("fma_avx2", ["vfmadd231ps ymm"] * 24),
    ],
)
def test_the_loops_that_show_a_peak_are_what_they_seem(
    function: str, operations: list[str], disassembly: dict[str, list[tuple[str, str]]]
) -> None:
    """Each loop consists of multiply-adds in registers, a counter and a jump to its start, without spills."""
    code = next(lines for name, lines in disassembly.items() if name.startswith(f"{function}()"))
    end = next(index for index, (_, line) in enumerate(code) if line.startswith("jne"))
    first = [address for address, _ in code].index(code[end][1].split()[1])
    loop = [line for _, line in code[first : end + 1]]
    assert [" ".join(re.findall(r"^(?:{vex} )?\w+|[yz]mm", line)[:2]) for line in loop[:-2]] == operations
    assert re.match(r"(dec|sub)", loop[-2]) and not any("(" in line for line in loop[:-1])
    places = [line.rpartition(",")[2] for line in loop[:-2] if not re.match(r"vpmadd", line)]
    assert len(set(places)) == 12  # consecutive sums are independent


@pytest.fixture(scope="module")
def disassembly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Returns (address, instruction) pairs of each function, as the compiler that built this program makes them."""
    path = tmp_path_factory.mktemp("probes") / "probes.o"
    source = Path(__file__).parents[3] / "kernels/cpu/native/probes/arithmetic.cpp"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-O3", "-fPIC", f"-I{source.parents[1]}", "-c", source, "-o", path],
        check=True,
        timeout=60,
    )
    command: list[str | Path] = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    functions: dict[str, list[tuple[str, str]]] = {}
    for name, body in re.findall(r"^[0-9a-f]+ <(?:.*::)?(\w+\(.*)>:\n((?:.+\n)*)", text, re.MULTILINE):
        functions[name] = re.findall(r"^ *([0-9a-f]+):\t(.*?) *$", body, re.MULTILINE)
    return functions


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


def test_machine_is_measured_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_bandwidth_is_that_of_the_bytes_that_were_read` checks that probes keep to the requested time."""
    asked_s: list[float] = []

    class Probe:
        def __init__(self, threads: int, cache_multiple: int) -> None:
            assert cache_multiple <= 4, "a larger buffer takes long to fill"
            self._probe = _native.ReadProbe(threads, cache_multiple)

        def measure(self, seconds: float) -> float:
            asked_s.append(seconds)
            return self._probe.measure(seconds)

    def int8_peak(threads: int, seconds: float) -> float:
        asked_s.append(seconds)
        return _native.int8_peak(threads, seconds)

    monkeypatch.setattr(probes, "_native", SimpleNamespace(ReadProbe=Probe, int8_peak=int8_peak))
    machine = probes.measure_machine(2)
    assert machine.read_bytes_s > 1e8 and machine.int8_macs_s > 1e8
    assert len(asked_s) == 2 and sum(asked_s) < 0.5


@pytest.mark.parametrize(("threads", "seconds"), [(0, 1.0), (-1, 1.0), (1025, 1.0), (1, 0.0), (1, 61.0), (1, math.nan)])
def test_impossible_requests_are_refused(threads: int, seconds: float) -> None:
    for probe in (lambda t, s: _native.ReadProbe(t, 1).measure(s), probes.int8_peak, probes.fma_peak):
        with pytest.raises(ValueError, match=r"threads|seconds"):
            probe(threads, seconds)
    with pytest.raises(ValueError, match="cache_multiple"):
        _native.ReadProbe(1, 65)
