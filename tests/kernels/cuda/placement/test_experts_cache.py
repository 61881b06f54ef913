"""Checks that stages with frequently used experts on the GPU and others in RAM give the bits of one processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Event as Flag
from threading import Thread
from time import monotonic, sleep

import numpy as np
import pytest

from llamaclust.core.errors import DeviceLostError
from llamaclust.kernels.backend import Batch, Stage
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.experts_cache import copies
from llamaclust.kernels.cuda.experts_cache.opening import slots_in
from llamaclust.kernels.cuda.experts_cache.slots import pools_bytes
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Device, Event
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.kernels.split_experts import SplitExpertsBackend, SplitExpertsStage
from llamaclust.model.loader import Model
from support.arithmetic.batches import batch_of, load_stage
from support.cuda.cached_experts import (
    SETTLE_S,
    SlowCopies,
    bytes_for,
    cache_of,
    cache_plan,
    expert_count,
    load_cached,
)
from support.cuda.shim_device import ShimDevice
from support.cuda.stages import LIMITS, Free, Open
from support.seed import SEED

FAMILIES = ("moe", "llama-experts", "qwen2moe", "glm4moe", "bailingmoe2", "minimax-m2", "gpt-oss", "gemma4-experts")
STEPS = 24


def random_batches(model: Model, steps: int = STEPS, number: int = 0) -> Iterator[Batch]:
    """Yields batches of prompts and single tokens, of up to three sequences."""
    random = np.random.default_rng([SEED, number])
    at, tables = [0, 0, 0], [[0, 1, 2], [5, 4, 3], [8, 6, 7]]
    for number in range(steps):
        parts = []
        for sequence, table in enumerate(tables):
            rows = int(random.choice([0, 1, 1, 1, 5])) if number else 2
            if at[sequence] + rows > 48:
                at[sequence] = 0
            if rows:
                tokens = random.integers(3, model.hyperparameters.vocabulary_size, rows)
                parts.append((tokens, range(at[sequence], at[sequence] + rows), table))
                at[sequence] += rows
        if parts:
            yield batch_of(parts)


def run_alike(cpu: Stage, found: Stage, batches: Iterable[Batch], settle: bool | None = None) -> None:
    """Checks that both stages give the same bits. `settle` waits for copies after each step; None: at random."""
    random = np.random.default_rng(SEED + 1)
    for number, batch in enumerate(batches):
        wanted = cpu.run(batch, None)
        result = found.run(batch, None)
        np.testing.assert_array_equal(result.view(np.uint32), wanted.view(np.uint32), f"microbatch {number}")
        assert np.isfinite(wanted).all()
        is_waited = bool(random.integers(0, 2)) if settle is None else settle
        if is_waited and isinstance(found, SplitExpertsStage) and found.cache is not None:
            assert cache_of(found).settle(SETTLE_S)


@pytest.fixture
def slow_copies(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slows copies down, so that a step that reads an expert before or during its copy finds NaN."""
    if isinstance(device, ShimDevice):
        monkeypatch.setattr(device, "copy_in_background", SlowCopies(device).copy)


@pytest.mark.parametrize("name", FAMILIES)
def test_hits_misses_and_evictions(
    opened: Open,
    cpu: CpuBackend,
    cuda: CudaBackend,
    slow_copies: None,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short half-life makes the cache replace experts often."""
    monkeypatch.setattr("llamaclust.kernels.cuda.experts_cache.table._HALF_LIFE_STEPS", 4)
    monkeypatch.setattr("llamaclust.kernels.cuda.experts_cache.table._LEAD_USES", 0.01)
    model = opened(name)
    plain, few = load_stage(cpu, model, limits=LIMITS), expert_count(model) // 3
    stage = load_cached(cuda, cpu, model, bytes_for(model, few))
    cache = cache_of(stage)
    for number in range(10):
        run_alike(plain, stage, random_batches(model, number=number))
        assert cache.settle(SETTLE_S)
        if cache.counts.copied_bytes > cache.counts.used_bytes:
            break
    counts, expert_bytes = cache.counts, [pool.layout.expert_bytes for pool in cache_plan(model).pools]
    assert counts.hits > 0 and counts.misses > few
    assert counts.copied_bytes > counts.used_bytes > 0, "others were evicted"
    assert counts.used_bytes <= few * max(expert_bytes)
    for each in (plain, stage):
        each.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("experts", ["none", "one", "all but one", "all"])
def test_caches_of_any_size(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, slow_copies: None, experts: str, threads: int
) -> None:
    model, several = opened("glm4moe"), CpuBackend(threads)
    every = expert_count(model)
    count = {"none": 0, "one": 1, "all but one": every - 1, "all": every}[experts]
    plain = load_stage(cpu, model, limits=LIMITS)
    stage = load_cached(cuda, several, model, bytes_for(model, count) if count else bytes_for(model, 1) - 1)
    run_alike(plain, stage, random_batches(model), settle=True)
    assert (stage.cache is None) == (count == 0)
    if stage.cache is not None:
        cache, size = cache_of(stage), cache_plan(model).pools[0].layout.expert_bytes
        before = cache.counts
        assert before.used_bytes <= count * size and before.hits > 0
        if count == every:
            assert before.copied_bytes == before.used_bytes, "nothing is evicted"
            run_alike(plain, stage, random_batches(model), settle=True)
            assert cache.counts.misses == before.misses, "all that are used are there"
        else:
            assert count > 1 or before.used_bytes == size
    for each in (plain, stage):
        each.close()


def test_the_bound_is_kept_to_the_byte(opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device) -> None:
    """The cache holds as many experts as fit into any limit in bytes, and frees their memory."""
    model, random = opened("gpt-oss"), np.random.default_rng(SEED)
    plan, least = cache_plan(model), bytes_for(model, 1)
    most = bytes_for(model, expert_count(model))
    for n_bytes in (least, *random.integers(least, most, 4).tolist(), most, most + 12345):
        stage = load_cached(cuda, cpu, model, n_bytes)
        slots, taken = slots_in(plan, n_bytes), cache_of(stage).n_bytes
        assert taken == aligned(plan.n_bytes) + pools_bytes(slots) <= n_bytes
        (layout,) = slots
        if slots[layout] < expert_count(model):
            assert aligned(plan.n_bytes) + layout.pool_bytes(slots[layout] + 1) > n_bytes, "room for one more"
        before = Free.of(device)
        cache_of(stage).close()
        assert -before.taken == (taken if before.is_exact else 0)
        stage.close()


def test_without_graphs(opened: Open, cpu: CpuBackend, device: Device, slow_copies: None) -> None:
    model, plain = opened("moe"), CudaBackend("cuda:0", device, 1, graphs=False)
    stages = load_stage(cpu, model, limits=LIMITS), load_cached(plain, cpu, model, bytes_for(model, 4))
    run_alike(*stages, random_batches(model))
    assert cache_of(stages[1]).counts.hits > 0
    for stage in stages:
        stage.close()


def test_more_rows_than_the_cache_serves(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.kernels.split_experts.MOST_CACHED_ROWS", 4)
    monkeypatch.setattr("llamaclust.kernels.cuda.backend.MOST_CACHED_ROWS", 4)
    model = opened("qwen2moe")
    stages = load_stage(cpu, model, limits=LIMITS), load_cached(cuda, cpu, model, 1 << 22)
    run_alike(*stages, random_batches(model), settle=True)
    assert cache_of(stages[1]).counts.hits > 0
    for stage in stages:
        stage.close()


def test_a_load_ends_the_caches_that_are_there(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device
) -> None:
    """Memory of existing caches counts as free; the load closes them, and their stages use the processor alone."""
    model = opened("moe")
    plain, n_bytes = load_stage(cpu, model, limits=LIMITS), bytes_for(model, 6)
    stage = load_cached(cuda, cpu, model, n_bytes)
    cache, reserved_bytes = cache_of(stage), device.memory_bytes // 256
    run_alike(plain, stage, random_batches(model), settle=True)
    if isinstance(device, ShimDevice):
        assert cuda.free_bytes == device.free_bytes + cache.n_bytes - reserved_bytes
    other = load_stage(cuda, model, limits=LIMITS)
    assert cache.n_bytes == 0 and cache.counts.used_bytes == 0
    hits = cache.counts.hits
    run_alike(plain, stage, random_batches(model))
    assert cache.counts.hits == hits > 0
    for each in (plain, stage, other):
        each.close()


class _BusError(Exception):
    """A driver error."""


def test_a_gpu_that_is_lost_by_a_copy(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step raises DeviceLostError."""
    model = opened("moe")
    stage = load_cached(cuda, cpu, model, bytes_for(model, 4))

    def copy(buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        raise _BusError("unspecified launch failure")

    monkeypatch.setattr(device, "failures", (_BusError,))
    monkeypatch.setattr(device, "copy_in_background", copy)
    first, second, *_ = random_batches(model)
    stage.run(first, None)
    assert cache_of(stage).settle(SETTLE_S)
    with pytest.raises(DeviceLostError, match=r"cuda:0 \(.*\) is lost: unspecified launch failure"):
        stage.run(second, None)
    stage.close()


def test_a_cache_ends_behind_the_step_that_runs(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("moe")
    plain, stage = load_stage(cpu, model, limits=LIMITS), load_cached(cuda, cpu, model, bytes_for(model, 4))
    cache, batches = cache_of(stage), list(random_batches(model))
    run_alike(plain, stage, batches[:6], settle=True)
    is_inside, may_go_on, route = Flag(), Flag(), stage.experts.route

    def wait(number: int, x: np.ndarray) -> object:
        is_inside.set()
        assert may_go_on.wait(SETTLE_S)
        return route(number, x)

    with monkeypatch.context() as patched:
        patched.setattr(stage.experts, "route", wait)
        results: list[bytes] = []
        running = Thread(target=lambda: results.append(stage.run(batches[6], None).tobytes()))
        running.start()
        assert is_inside.wait(SETTLE_S)
        closing = Thread(target=cache.close)
        closing.start()
        assert cache.n_bytes > 0, "the step goes on with it"
        may_go_on.set()
        for thread in (running, closing):
            thread.join(SETTLE_S)
    assert cache.n_bytes == 0 and results == [plain.run(batches[6], None).tobytes()]
    run_alike(plain, stage, batches[7:])
    for each in (plain, stage):
        each.close()


def test_a_cache_that_is_collected_waits_for_no_copy(
    opened: Open, cpu: CpuBackend, cuda: CudaBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collecting thread may hold a lock that the copy waits for, so the buffer is freed only after the copy."""
    model = opened("moe")
    stage = load_cached(cuda, cpu, model, bytes_for(model, 4))
    is_inside, may_go_on, copied = Flag(), Flag(), device.copy_in_background

    def copy(buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        is_inside.set()
        assert may_go_on.wait(SETTLE_S)
        return copied(buffer, parts)

    monkeypatch.setattr(device, "copy_in_background", copy)
    first, *_ = random_batches(model)
    stage.run(first, None)
    assert is_inside.wait(SETTLE_S)
    held, cached_bytes = [stage.cache], cache_of(stage).n_bytes
    stage.cache = None
    collecting = Thread(target=held.clear)
    collecting.start()
    collecting.join(SETTLE_S / 4)
    before = device.free_bytes
    assert not collecting.is_alive()
    may_go_on.set()
    deadline = monotonic() + SETTLE_S
    while device.free_bytes == before and monotonic() < deadline:
        sleep(0.001)
    if isinstance(device, ShimDevice):
        assert device.free_bytes == before + cached_bytes
    stage.close()


@pytest.mark.parametrize("copies_before", [0, 1, 3])
def test_a_cache_that_is_closed_during_a_copy_is_settled(
    opened: Open,
    cpu: CpuBackend,
    cuda: CudaBackend,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    copies_before: int,
) -> None:
    """A running copy ends before the close returns, and no copy follows."""
    model, copied = opened("moe"), device.copy_in_background
    is_inside, is_closing, begun = Flag(), Flag(), list[Buffer]()

    class JoinedThread(Thread):
        def join(self, timeout: float | None = None) -> None:
            is_closing.set()
            super().join(timeout)

    def copy(buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        begun.append(buffer)
        if len(begun) > copies_before:
            is_inside.set()
            assert is_closing.wait(SETTLE_S)
        return copied(buffer, parts)

    monkeypatch.setattr(copies, "Thread", JoinedThread)
    monkeypatch.setattr(device, "copy_in_background", copy)
    stage = load_cached(cuda, cpu, model, bytes_for(model, 4))
    first, *_ = random_batches(model)
    stage.run(first, None)
    assert is_inside.wait(SETTLE_S)
    cache = cache_of(stage)
    cache.close()
    assert cache.settle(0) and len(begun) == copies_before + 1
    stage.close()


def test_memory_in_ram_is_planned(opened: Open, cpu: CpuBackend, cuda: CudaBackend) -> None:
    model = opened("gemma4-experts")
    backend = SplitExpertsBackend(cuda, cpu, range(model.layer_count), bytes_for(model, 3))
    program = model.program(0, model.layer_count)
    planned = backend.workspace_bytes(program, model.tensors_for(program), LIMITS)
    stage = load_stage(backend, model, limits=LIMITS)
    assert stage.workspace_bytes == planned
    stage.close()
