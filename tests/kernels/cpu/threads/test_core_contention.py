"""Tests of a pool's number of threads while another program needs a core, on machines with a simulated clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from llamaclust.kernels._native import CoreContention

PREFILL_ROWS = 512
LONGEST_RETURN_JOBS = 512 + 8 + 8
"""The most jobs until all threads are used again: the longest hold, jobs for comparison, and a trial."""

Speedup = Callable[[int], float]
"""The speedup of a number of threads over one thread on otherwise idle cores."""


def memory_bound(threads: int) -> float:
    return 1 + 0.2 * math.log2(threads)


def arithmetic_bound(threads: int) -> float:
    return threads


@dataclass(slots=True)
class Machine:
    """A machine on which other programs take `stolen` of the time of `taken` cores; jobs on few cores lose less."""

    speedup: Speedup
    rows: int = 1
    cores: int = 2
    stolen: float = 0.0
    taken: int = 1
    gap_ns: int = 200_000  # between jobs
    stolen_gap_ns: int = 0  # additional gap if all cores are used, since the thread that submits jobs waits
    hiccup: float = 0.0  # probability
    now_ns: int = 10**9
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def job(self, contention: CoreContention | None) -> int:
        """Runs a job and returns its number of threads."""
        threads = self.cores if contention is None else contention.threads(self.rows)
        met = max(threads + self.taken - self.cores, 0) / self.taken  # share of the taken cores
        alone_ns, spread = (2.4e6, 0.5) if self.rows == 1 else (1e8, 0.1)  # long jobs vary less
        missing = min(max(self.stolen * met * self.random.gauss(1, spread), 0.0), 0.9)
        wall_ns = alone_ns / self.speedup(threads) / (1 - missing) * self.random.gauss(1, 0.03)
        waited_ns = (threads - 1) * wall_ns * (missing + 0.02)
        if self.random.random() < self.hiccup:
            wall_ns, waited_ns = 5 * wall_ns, waited_ns + 4 * (threads - 1) * wall_ns
        began_ns = self.now_ns + self.gap_ns + int(met * self.stolen_gap_ns)
        self.now_ns = began_ns + int(wall_ns)
        if contention is not None:
            contention.report(self.rows, began_ns, self.now_ns, int(waited_ns))
        return threads

    def jobs(self, contention: CoreContention | None, count: int) -> list[int]:
        return [self.job(contention) for _ in range(count)]


def share(threads: int, chosen: list[int]) -> float:
    return chosen.count(threads) / len(chosen)


@pytest.mark.parametrize("speedup", [memory_bound, arithmetic_bound])
@pytest.mark.parametrize("rows", [1, PREFILL_ROWS])
def test_a_quiet_machine_is_used_whole(rows: int, speedup: Speedup) -> None:
    assert share(2, Machine(speedup, rows).jobs(CoreContention(2), 5000)) == 1


@pytest.mark.parametrize("speedup", [memory_bound, arithmetic_bound])
@pytest.mark.parametrize("rows", [1, PREFILL_ROWS])
@pytest.mark.parametrize("hiccup", [0.005, 0.02])
def test_hiccups_cost_less_than_a_hundredth_more(rows: int, speedup: Speedup, hiccup: float) -> None:
    machine, whole = (Machine(speedup, rows, hiccup=hiccup) for _ in range(2))
    machine.jobs(CoreContention(2), 20_000)
    whole.jobs(None, 20_000)
    assert machine.now_ns < 1.01 * whole.now_ns


@pytest.mark.parametrize("cores", [2, 4, 6])
def test_decode_leaves_a_core_to_a_program_that_takes_much_of_it(cores: int) -> None:
    contention, machine = CoreContention(cores), Machine(memory_bound, cores=cores, stolen=0.4)
    early = machine.jobs(contention, 64)
    assert early[:8] == [cores] * 8  # nothing is measured yet
    assert share(cores, machine.jobs(contention, 2000)) < 0.1


def test_halved_more_than_once_where_most_cores_are_taken() -> None:
    machine = Machine(memory_bound, cores=8, stolen=0.75, taken=6)
    assert share(2, machine.jobs(CoreContention(8), 4000)) > 0.8


def test_fewer_threads_are_not_kept_where_they_are_a_little_slower() -> None:
    machine = Machine(lambda threads: 1.0 + 0.6 * (threads - 1), stolen=0.3)
    assert share(2, machine.jobs(CoreContention(2), 2000)) > 0.9


def test_a_trial_that_is_far_too_slow_ends_early() -> None:
    contention, machine = CoreContention(2), Machine(arithmetic_bound, PREFILL_ROWS, stolen=0.85)
    chosen = machine.jobs(contention, 4000)[100:]
    assert {len(run) for run in "".join(map(str, chosen)).split("1") if run} == {2}


def test_a_core_that_only_others_miss_is_left_to_them() -> None:
    """Jobs are no slower on all cores, but the thread that submits them waits for a core in between."""
    machine = Machine(lambda threads: 1.0 + 0.25 * (threads - 1), stolen=0.15, stolen_gap_ns=1_500_000)
    assert share(1, machine.jobs(CoreContention(2), 2000)) > 0.9


def test_idle_time_between_jobs_is_no_reason() -> None:
    machine = Machine(arithmetic_bound, stolen=0.3, gap_ns=10**9)
    assert share(2, machine.jobs(CoreContention(2), 2000)) > 0.9


@pytest.mark.parametrize(("stolen", "expected"), [(0.3, 2), (0.4, 2), (0.7, 1)])
def test_prefill_keeps_all_threads_unless_more_than_half_is_taken(stolen: float, expected: int) -> None:
    machine = Machine(arithmetic_bound, PREFILL_ROWS, stolen=stolen)
    assert share(expected, machine.jobs(CoreContention(2), 2000)) > 0.9


@pytest.mark.parametrize("cores", [2, 4, 6])
def test_all_threads_are_back_soon_after_the_other_program_ends(cores: int) -> None:
    contention, machine = CoreContention(cores), Machine(memory_bound, cores=cores, stolen=0.5)
    assert share(cores, machine.jobs(contention, 5000)) < 0.1
    machine.stolen = 0.0
    machine.jobs(contention, LONGEST_RETURN_JOBS * math.ceil(math.log2(cores)))
    assert share(cores, machine.jobs(contention, 2000)) == 1


def test_jobs_of_another_kind_are_not_concerned() -> None:
    contention, decode = CoreContention(2), Machine(memory_bound, stolen=0.4)
    decode.jobs(contention, 200)
    assert [contention.threads(rows) for rows in (1, 2, 8, 9, PREFILL_ROWS, 100_000)] == [1, 2, 2, 2, 2, 2]


def test_kinds_that_take_turns_learn_apart() -> None:
    contention = CoreContention(2)
    decode, prefill = Machine(memory_bound, stolen=0.4), Machine(arithmetic_bound, PREFILL_ROWS, stolen=0.4)
    chosen: dict[int, list[int]] = {1: [], PREFILL_ROWS: []}
    for _ in range(1000):
        for machine, other in ((decode, prefill), (prefill, decode)):
            chosen[machine.rows].append(machine.job(contention))
            other.now_ns = machine.now_ns
    assert share(1, chosen[1]) > 0.8
    assert share(2, chosen[PREFILL_ROWS]) > 0.9


def test_one_thread_stays_one() -> None:
    assert set(Machine(memory_bound, cores=1, stolen=0.5).jobs(CoreContention(1), 100)) == {1}
