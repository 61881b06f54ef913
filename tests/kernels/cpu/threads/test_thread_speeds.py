"""Tests of work divided among threads of unequal speed: cores with a simulated clock, and the bits of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from llamaclust.kernels._native import ThreadPool, ThreadSpeeds
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from support.arithmetic.batches import Chain
from support.paths import DATA
from support.seed import SEED

UNITS = 100_000
SETTLED_JOBS = 200
HYBRID = (1.0, 1.0, 0.5, 0.25)


def parts(speeds: ThreadSpeeds, threads: int) -> list[float]:
    """Returns each thread's share of the work."""
    return [(end - begin) / UNITS for begin, end in pairwise(speeds.begin(UNITS, i) for i in range(threads + 1))]


def run_jobs(
    speeds: ThreadSpeeds, cores: Sequence[float], jobs: int, slowdown: Callable[[], float] = lambda: 1.0
) -> list[float]:
    """Returns the threads' shares after jobs on cores of these speeds; `slowdown` multiplies the time of each part."""
    for _ in range(jobs):
        speeds.open(len(cores))
        if speeds.measures:
            for thread, (part, core) in enumerate(zip(parts(speeds, len(cores)), cores, strict=True)):
                speeds.add(thread, int(1e6 * part / core * slowdown()) + 1)
        speeds.close()
    return parts(speeds, len(cores))


@pytest.mark.parametrize("cores", [HYBRID, (0.3, 1.0), (1.0,) * 6 + (0.6,) * 8, (0.01, 1.0)])
def test_all_threads_take_equally_long_for_their_parts(cores: tuple[float, ...]) -> None:
    found = run_jobs(ThreadSpeeds(len(cores)), cores, SETTLED_JOBS)
    least = 1 / 16 / len(cores)
    wanted = [max(core / sum(cores), 0.9 * least) for core in cores]
    assert found == pytest.approx(wanted, rel=0.13)
    assert sum(found) == pytest.approx(1)


def test_equal_threads_keep_equal_parts() -> None:
    random = Random(SEED)
    found = run_jobs(ThreadSpeeds(3), (1.0, 1.0, 1.0), 2000, lambda: random.uniform(0.97, 1.05))
    assert found == pytest.approx([1 / 3] * 3, abs=2e-5)


def test_a_thread_that_was_not_running_for_a_while_keeps_its_part() -> None:
    speeds, random = ThreadSpeeds(2), Random(SEED)
    hiccups = iter(lambda: 20.0 if random.random() < 0.1 else 1.0, None)
    found = [run_jobs(speeds, (1.0, 1.0), 1, lambda: next(hiccups))[0] for _ in range(2000)]
    assert np.mean(np.array(found) == 0.5) > 0.9


def test_parts_follow_threads_that_change_cores() -> None:
    speeds = ThreadSpeeds(2)
    assert run_jobs(speeds, (1.0, 0.25), SETTLED_JOBS)[0] == pytest.approx(0.8, rel=0.1)
    assert run_jobs(speeds, (0.25, 1.0), SETTLED_JOBS)[0] == pytest.approx(0.2, rel=0.1)


def test_threads_that_take_no_part_have_none() -> None:
    speeds = ThreadSpeeds(4)
    run_jobs(speeds, HYBRID, SETTLED_JOBS)
    speeds.open(3)
    assert parts(speeds, 3) == pytest.approx([0.4, 0.4, 0.2], rel=0.13)
    assert run_jobs(speeds, HYBRID[:1], 8) == [1.0]


def test_parts_cover_all_work_once() -> None:
    random = Random(SEED)
    for _ in range(200):
        cores = [random.uniform(0.05, 1) for _ in range(random.randint(1, 40))]
        speeds, count = ThreadSpeeds(len(cores)), random.randint(0, 500)
        run_jobs(speeds, cores, 20)
        bounds = [speeds.begin(count, thread) for thread in range(len(cores) + 1)]
        assert bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, count)


@pytest.mark.parametrize("speeds", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_speeds_are_positive_and_one_for_each_thread(speeds: list[float]) -> None:
    with pytest.raises(ValueError, match="a positive speed for each thread"):
        ThreadPool(2, False).set_speeds(speeds)


@pytest.mark.parametrize("name", ["tiny/llama", "quant/Q4_K_M", "quant/mixed-experts"])
def test_speeds_of_threads_change_no_bit(name: str) -> None:
    random = Random(SEED)
    found = []
    for threads in (1, 3, 3, 4):
        backend = CpuBackend(threads, yields=False)
        backend._pool.set_speeds([random.uniform(0.05, 1) for _ in range(threads)])
        with Model.open(DATA / f"{name}.gguf") as model:
            chain = Chain(backend, model)
            found.append(chain.logits([5, 9, 200, 31, 7] * 12, (50, 7, 3)).tobytes())
            chain.close()
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["tiny/llama", "quant/Q4_K_M", "quant/mixed-experts", "tiny/qwen2"])
def test_threads_that_lose_their_cores_change_no_bit(name: str) -> None:
    """More threads than cores lose them in the middle of a piece of work, so each run divides the work differently."""
    random = Random(SEED)
    tokens = random.choices(range(3, 300), k=100)
    chunks = (64, 5, 9, 1, 21)
    found = set()
    with Model.open(DATA / f"{name}.gguf") as model:
        for threads in (1, *(random.randint(5, 16) for _ in range(8))):
            chain = Chain(CpuBackend(threads, yields=False), model)
            found.add(chain.logits(tokens, chunks).tobytes())
            chain.close()
    assert len(found) == 1
