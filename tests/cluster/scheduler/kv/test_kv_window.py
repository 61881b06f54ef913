"""Tests the scheduler with layers that keep KV memory of a window, on fake stages that check the stored values."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.kv.groups import WindowGroup, window_group
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.plans.drafting import AnyWindows, SaidDrafters, replayed


@dataclass
class WindowedModel(FakeModel):
    """A model with the memory of window layers, where each row must see values of its own sequence alone."""

    group: WindowGroup = field(default_factory=lambda: WindowGroup(1, 1))
    window_blocks: int = 0
    window_kv: dict[tuple[int, int], int] = field(default_factory=dict)
    most: int = 0  # the most blocks of one sequence

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        tables = [self._window_table(chunk) for chunk in microbatch.chunks]
        for chunk, table in zip(microbatch.chunks, tables, strict=True):
            self._check(chunk, table, chunk.position)
        for chunk, table in zip(microbatch.chunks, tables, strict=True):
            for position, token in enumerate(chunk.tokens, chunk.position):
                self.window_kv[self._place(chunk, table, position)] = token
        rows = super().run(microbatch, inputs)
        for chunk, table in zip(microbatch.chunks, tables, strict=True):
            # keys and values of all rows are stored before any row reads them
            self._check(chunk, table, chunk.position + len(chunk.tokens))
        return rows

    def _check(self, chunk: Chunk, table: list[int], end: int) -> None:
        tokens = self._read(self._table(chunk), end)
        for position in range(max(0, chunk.position - self.group.window + 1), end):
            assert self.window_kv[self._place(chunk, table, position)] == tokens[position]

    def _window_table(self, chunk: Chunk) -> list[int]:
        runs = zip(chunk.window_table[::2], chunk.window_table[1::2], strict=True)
        table = [block for start, count in runs for block in range(start, start + count)]
        self.most = max(self.most, len(table))
        assert all(0 <= block < self.window_blocks for block in table) and len(set(table)) == len(table)
        return table

    @staticmethod
    def _place(chunk: Chunk, table: list[int], position: int) -> tuple[int, int]:
        index = position // KV_BLOCK_TOKENS - chunk.window_start
        assert 0 <= index < len(table), "a block that is not there is needed"
        return table[index], position % KV_BLOCK_TOKENS


def simulation(window: int, free: int = 0, stages: int = 2, **changes: object) -> Simulation:
    """Makes a simulation with the window blocks of one sequence, and `free` more."""
    base = SchedulerSettings("m", VOCABULARY, context_length=400, kv_blocks=100, max_sequences=6, max_batch_tokens=64)
    chosen = replace(base, max_outputs=32, **changes)  # type: ignore[arg-type]
    group = WindowGroup(window, chosen.max_batch_tokens)
    blocks = group.sequence_blocks + group.row_blocks + free
    chosen = replace(chosen, window=window, window_blocks=blocks)
    model = WindowedModel(chosen.kv_blocks, group=group, window_blocks=blocks)
    return Simulation(Scheduler(chosen, 1, stages), FakeStages(model, [linear(100, 10)] * stages, 1000))


def generation(
    length: int, max_new_tokens: int, start: int = 1, seed: int = 0, score_from: int | None = None
) -> GenerationRequest:
    prompt = tuple((start + 7 * i) % VOCABULARY for i in range(length))
    return GenerationRequest("r", prompt, max_new_tokens, seed=seed, score_from=score_from)


def check(run: Simulation, key: int, request: GenerationRequest) -> None:
    chosen, scored, _ = expected(request, run.scheduler.settings.max_sequence_tokens)
    assert run.rows(key) == chosen
    assert run.scores(key) == scored


def all_is_given_back(run: Simulation) -> bool:
    memory = run.scheduler.queues.memory
    assert memory.window is not None
    return memory.blocks.held == memory.window.blocks.held == 0


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_mixes_in_little_memory_end_and_give_the_same_tokens(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _random_mixes_end(seed, patch)


def _random_mixes_end(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(seed)
    texts: list[list[int]] = []
    says = replayed(texts, source.choice([0.5, 0.9, 1.0]), source, VOCABULARY)
    run = simulation(
        source.choice([1, 2, 6, 15, 16, 17, 40, 100]),
        free=source.choice([0, 0, 1, 3, 10, 60]),
        stages=source.randint(1, 4),
        kv_blocks=source.randint(13, 60),
        context_length=200,
        prefill_chunk=source.choice([None, 1, 5, 16, 50]),
        max_batch_tokens=source.choice([16, 64, 128]),
        prefix_cache=source.random() < 0.8,
        max_sequences=source.randint(1, 8),
        speculation=source.choice([None, SpeculationSettings(SaidDrafters(says), source.choice([1, 3, 32]))]),
    )
    monkeypatch.setattr(speculation, "best_windows", AnyWindows(source, 32))
    requests: dict[int, GenerationRequest] = {}
    epoch = 1
    for number in range(source.randint(1, 12)):
        tokens = source.choice([0, 1, 3, 30, 90])
        score_from = source.choice([None, 5, 60]) if tokens else 1
        request = generation(
            source.choice([2, 15, 16, 17, 48, 97, 150]), tokens, source.randint(0, 2), number, score_from
        )
        answer = expected(request, run.scheduler.settings.max_sequence_tokens)[0]
        texts.append([*request.prompt, *(row.token for row in answer)])
        requests[run.add(request)] = request
        for _ in range(source.choice([0, 0, 1, 5, 20])):
            run.step()
        if source.random() < 0.15:
            victim = source.choice(list(requests))
            if run.scheduler.abort(victim) is not None:
                del requests[victim]
        if source.random() < 0.1:
            epoch += 1
            _restart(run, epoch)
    run.finish()
    for key, request in requests.items():
        check(run, key, request)
    assert all_is_given_back(run)


def _restart(run: Simulation, epoch: int) -> None:
    """Restarts the scheduler on stages with empty memory."""
    run.send_all()
    run.sent.clear()
    model = run.stages.model
    assert isinstance(model, WindowedModel)
    fresh = WindowedModel(model.kv_blocks, group=model.group, window_blocks=model.window_blocks)
    run.stages = FakeStages(fresh, run.stages.stage_ns, 1000)
    run.scheduler.restart(run.scheduler.settings, epoch, len(run.stages.stage_ns))


def test_a_long_sequence_holds_its_window_and_the_rows_of_one_microbatch() -> None:
    run = simulation(64, free=200, kv_blocks=300, context_length=4800, max_batch_tokens=512)
    held = []
    memory = run.scheduler.queues.memory.window
    assert memory is not None
    run.check = lambda scheduled: held.append(memory.blocks.held)
    request = generation(4096, 40)
    key = run.add(request)
    run.finish()
    check(run, key, request)
    model = run.stages.model
    assert isinstance(model, WindowedModel)
    assert model.most <= (64 + 512) // 16 + 1
    assert max(held) <= 64 // 16 + 1, "between microbatches"
    assert all_is_given_back(run)


@pytest.mark.parametrize("owners", ["aaaa", "aaab", "abbb", "abab"])
def test_growth_preempts_where_window_blocks_are_short(owners: str) -> None:
    run = simulation(100, free=3, max_sequences=4)
    requests = [replace(generation(20, 150, start), owner=owner) for start, owner in enumerate(owners)]
    keys = [run.add(request) for request in requests]
    run.finish()
    for key, request in zip(keys, requests, strict=True):
        check(run, key, request)
    assert run.scheduler.counts.preemptions > 0
    assert all_is_given_back(run)


@pytest.mark.parametrize("running", [1, 3, 6])
def test_kv_memory_bounds_the_running_sequences(running: int) -> None:
    group = WindowGroup(100, 64)
    run = simulation(100, free=(running - 1) * group.sequence_blocks, kv_blocks=200)
    for start in range(8):
        run.add(generation(300, 60, start))
    most = 0
    while run.step():
        most = max(most, run.scheduler.counts.running)
    assert most == running
    assert run.scheduler.counts.preemptions == 0


def test_a_prefix_hit_needs_the_whole_window() -> None:
    run = simulation(40, free=0)
    first = generation(150, 3)
    check_later = [run.add(first)]
    run.finish()
    assert run.scheduler.queues.memory.window is not None
    again = run.add(first)
    run.finish()
    cached = run.scheduler.counts.cached_tokens
    assert cached == 144, "the last window is there"
    branch = replace(first, prompt=(*first.prompt[:80], *range(50)))
    other = run.add(branch)
    run.finish()
    for key, request in ((check_later[0], first), (again, first), (other, branch)):
        check(run, key, request)
    hit = run.scheduler.counts.cached_tokens - cached
    assert hit in range(0, 81, 16)


def test_the_longest_prefix_with_a_whole_window_is_shared() -> None:
    run = simulation(40, free=20)
    run.add(generation(150, 3))
    run.finish()
    window, chain = run.scheduler.queues.memory.window, chain_of(run, generation(150, 3))
    assert window is not None
    assert [window.usable(chain, found) for found in (0, 1, 5, 9)] == [0, 1, 5, 9]
    window.blocks.invalidate(chain[:2])
    assert [window.usable(chain, found) for found in (2, 4, 5, 9)] == [0, 0, 5, 9], "row 80 sees positions 41 to 80"
    window.blocks.invalidate(chain[2:3])
    assert [window.usable(chain, found) for found in (5, 6, 9)] == [0, 6, 9]
    window.blocks.invalidate(chain[7:8])
    assert window.usable(chain, 9) == 7


def chain_of(run: Simulation, request: GenerationRequest) -> BlockKeys:
    chain = BlockKeys()
    run.scheduler.queues.memory._cache.find(chain, request.prompt, len(request.prompt) - 1)
    return chain


def test_groups_are_made_where_they_save_memory() -> None:
    assert window_group(None, 4096, 544) is None
    assert window_group(4096, 4096, 544) is None
    assert window_group(1024, 8192, 544) == (group := WindowGroup(1024, 544))
    assert group.sequence_blocks == 67 and group.row_blocks == 34
    assert [group.blocks_beside(n * 512, 8192, 32) for n in (0, 1, 2, 99)] == [
        67 + 34,
        128 + 34,
        128 + 4 * 67 + 34,
        32 * 67 + 34,
    ]
    assert [group.first_seen(at) for at in (0, 1023, 1024 + 14, 1024 + 15)] == [0, 0, 0, 1]

    assert WindowGroup(4096, 544).blocks_beside(4 * 512, 8192, 32) == 4 * 512


@pytest.mark.parametrize("context_length", [3000, 4096, 8192, 32_768])
@pytest.mark.parametrize("window", [1, 128, 1024, 2000])
def test_every_context_of_kv_memory_has_a_window(window: int, context_length: int) -> None:
    group = window_group(window, context_length, 544)
    assert group is not None
    for contexts in range(1, 33):
        kv_blocks = contexts * -(-context_length // KV_BLOCK_TOKENS)
        beside = group.blocks_beside(kv_blocks, context_length, 32)
        assert contexts * group.sequence_blocks <= beside - group.row_blocks <= kv_blocks - group.row_blocks


@pytest.mark.parametrize("context_length", [4096, 8192, 32_768])
def test_short_sequences_share_the_windows_of_one_context(context_length: int) -> None:
    group = WindowGroup(128, 64)
    kv_blocks = context_length // KV_BLOCK_TOKENS
    blocks = group.blocks_beside(kv_blocks, context_length, 6)
    run = simulation(
        128, free=blocks - group.sequence_blocks - group.row_blocks, kv_blocks=kv_blocks, context_length=context_length
    )
    for number in range(6):
        run.add(generation(200, 40, number))
    most = 0
    while run.step():
        most = max(most, run.scheduler.counts.running)
    assert most == 4


@pytest.mark.parametrize("window", range(1, 70))
def test_a_sequence_never_needs_more_than_it_is_promised(window: int) -> None:
    group = WindowGroup(window, 64)
    for at in range(200):
        for rows in (1, 2, 15, 16, 17, 33):
            held = -(-(at + rows) // KV_BLOCK_TOKENS) - group.first_seen(at)
            beside = 0 if rows <= 1 + group.drafted_rows else rows / KV_BLOCK_TOKENS
            assert held <= group.sequence_blocks + beside
