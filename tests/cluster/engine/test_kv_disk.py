"""Tests of KV memory on disk in the engine, on fake stages: answers do not depend on what is read, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest

from llamaclust.cluster.engine import kv_disk
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, WorkerError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.control.kv_disk import MAX_KEYS
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses, blocks_of, expected, tokens_of
from support.clusters.served import until

CONTEXT = 512
KV_BLOCKS = 96
SETTINGS = SchedulerSettings("m", VOCABULARY, CONTEXT, KV_BLOCKS, max_sequences=8)


@dataclass
class FakeDisks:
    """Implements `KvDisks` with blocks by key, like one stage that holds all layers. A message that no worker accepts
    ends the pipeline."""

    pipeline: FakePipeline
    engine: Engine | None = None
    kept: dict[bytes, list[int]] = field(default_factory=dict)
    damaged: set[bytes] = field(default_factory=set)
    found: int = 0  # Number of calls of `find`.
    restored: int = 0
    overwritten: int = 0  # Number of calls of `restore` for blocks in use.
    pieces: list[int] = field(default_factory=list)  # Numbers of blocks of the calls of `restore`.
    most: int = MAX_KEYS
    error: LlamaclustError | None = None
    room: int = 1 << 20
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # `find` waits until it is set.
    restore_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.restore_gate.set()

    def _accept(self, keys: Sequence[bytes]) -> None:
        if not 1 <= len(keys) <= self.most:
            error = ProtocolError(f"a message has {len(keys)} keys, must be within 1..{self.most}")
            self.pipeline.lose(error)
            raise error

    async def find(self, keys: Sequence[bytes]) -> int:
        self._accept(keys)
        self.found += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        return next((index for index, key in enumerate(keys) if key not in self.kept), len(keys))

    async def restore(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        self._accept(keys)
        self.pieces.append(len(blocks))
        assert self.engine is not None
        slices = self.engine.scheduler.in_flight.slices()
        self.overwritten += any(set(blocks_of(taken.chunk)) & set(blocks) for taken in slices)
        await asyncio.sleep(0)
        await self.restore_gate.wait()
        if self.error is not None:
            raise self.error
        for done, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            if key in self.damaged:
                del self.kept[key]
                return done
            self.pipeline.fake.model.kv[block] = [*self.kept[key]]
            self.restored += 1
        return len(keys)

    async def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        self._accept(keys)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        for key, block in zip(keys[-len(blocks) :], blocks, strict=True):
            if len(self.kept) >= self.room:
                return 0
            self.kept[key] = [*self.pipeline.fake.model.kv[block]]
            assert len(self.kept[key]) == KV_BLOCK_TOKENS
        return len(blocks)


def prompt(source: Random, length: int) -> tuple[int, ...]:
    return tuple(source.randrange(VOCABULARY) for _ in range(length))


def request(tokens: tuple[int, ...], salt: str = "", name: str = "r", new: int = 4) -> GenerationRequest:
    return GenerationRequest(name, tokens, new, SamplingParams(), seed=7, cache_salt=salt)


async def answered(engine: Engine, generation: GenerationRequest) -> list[int]:
    return tokens_of([event async for event in engine.submit(generation)])


def wanted(generation: GenerationRequest) -> list[int]:
    rows, _, _ = expected(generation, CONTEXT)
    return [row.token for row in rows]


async def saved(disks: FakeDisks, blocks: int) -> None:
    """Waits until at least `blocks` blocks are on disk."""
    async with asyncio.timeout(60):
        await until(lambda: len(disks.kept) >= blocks)


async def idle(engine: Engine) -> None:
    """Waits until no blocks are held for reading or writing."""
    async with asyncio.timeout(60):
        await until(lambda: not engine.scheduler.queues.memory.transfers.are_under_way)


def opened(disks: dict[bytes, list[int]], **fields: object) -> tuple[Engine, FakeDisks]:
    """Returns the engine and disks of a cluster that has just started, with the blocks of an earlier one."""
    pipeline = FakePipeline(KV_BLOCKS)
    found = FakeDisks(pipeline, kept=disks, **fields)  # type: ignore[arg-type]
    pipeline.kv_disks = found
    found.engine = Engine(pipeline, SETTINGS)
    return found.engine, found


async def written(generation: GenerationRequest) -> dict[bytes, list[int]]:
    """Returns what a cluster that answered the request leaves on disk."""
    kept: dict[bytes, list[int]] = {}
    engine, disks = opened(kept)
    async with engine:
        assert await answered(engine, generation) == wanted(generation)
        await saved(disks, len(generation.prompt) // KV_BLOCK_TOKENS)
    return kept


async def test_a_prompt_is_read_after_a_restart_of_everything() -> None:
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    engine, disks = opened(kept)
    async with engine:
        assert await answered(engine, generation) == wanted(generation)
        counts = engine.scheduler.counts
        assert (disks.restored, counts.cached_tokens) == (18, 288)
        assert counts.computed_tokens == 12
        assert counts.kv_blocks_held == 0
        await idle(engine)


async def test_a_longer_prompt_with_the_same_beginning_is_read_as_far_as_it_is_there() -> None:
    first = prompt(Random(1), 300)
    kept = await written(request(first))
    longer = request((*first[:256], *prompt(Random(2), 100)))
    engine, disks = opened(kept)
    async with engine:
        assert await answered(engine, longer) == wanted(longer)
        assert disks.restored == 16
        await saved(disks, 18 + 6)


@pytest.mark.parametrize("turns", range(5))
async def test_blocks_that_another_request_begins_to_compute_are_not_looked_for(turns: int) -> None:
    first, second = (request(prompt(Random(1), 200), name=name) for name in "ab")
    engine, _ = opened({})
    async with engine:
        answering = asyncio.create_task(answered(engine, first))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await answered(engine, second) == wanted(second)
        assert await answering == wanted(first)


async def test_no_more_blocks_are_read_than_a_message_names_when_earlier_ones_leave_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generation = request(prompt(Random(1), 480))
    kept = await written(generation)
    monkeypatch.setattr(kv_disk, "_MOST_BLOCKS", 16)
    engine, disks = opened(kept, most=16)
    async with engine:
        beginning = request(generation.prompt[:170])
        assert await answered(engine, beginning) == wanted(beginning)
        assert disks.restored == 10
        disks.gate.clear()
        answering = asyncio.create_task(answered(engine, generation))
        async with asyncio.timeout(60):
            await until(lambda: disks.found == 3)  # The save of the beginning was the second.
        engine.scheduler.queues.memory.blocks.invalidate(kept)
        disks.gate.set()
        assert await answering == wanted(generation)
        assert disks.restored == 10 + 16


async def test_another_salt_shares_nothing() -> None:
    tokens = prompt(Random(1), 300)
    kept = await written(request(tokens, "a"))
    engine, disks = opened(kept)
    async with engine:
        assert await answered(engine, request(tokens, "b")) == wanted(request(tokens, "b"))
        assert disks.restored == 0


async def test_a_damaged_block_and_what_follows_it_is_computed_again() -> None:
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    engine, disks = opened(kept, damaged={list(kept)[11]})
    async with engine:
        assert await answered(engine, generation) == wanted(generation)
        assert (disks.restored, engine.scheduler.counts.computed_tokens) == (11, 300 - 11 * KV_BLOCK_TOKENS)
        await saved(disks, 18)


@pytest.mark.parametrize(("damaged", "pieces"), [(None, [5, 5, 5, 3]), (11, [5, 5, 5]), (4, [5]), (5, [5, 5])])
async def test_blocks_are_read_in_pieces_up_to_the_first_damaged_one(
    damaged: int | None, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_disk, "_RESTORED_TOGETHER", 5)
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    engine, disks = opened(kept, damaged=set() if damaged is None else {list(kept)[damaged]})
    async with engine:
        assert await answered(engine, generation) == wanted(generation)
        restored = 18 if damaged is None else damaged
        assert (disks.pieces, disks.restored) == (pieces, restored)
        assert engine.scheduler.counts.computed_tokens == 300 - restored * KV_BLOCK_TOKENS


async def test_a_prompt_is_read_no_longer_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_disk, "_RESTORED_TOGETHER", 5)
    generation = request(prompt(Random(1), 300))
    engine, disks = opened(await written(generation))
    monkeypatch.setattr(kv_disk, "monotonic", lambda: 31.0 * len(disks.pieces))
    async with engine:
        assert await answered(engine, generation) == wanted(generation)
        assert disks.pieces == [5, 5] and engine.scheduler.counts.computed_tokens == 300 - 160
        assert "kv_disk_tokens_total 160.0" in engine.metrics.render().decode()


async def test_a_prompt_does_not_wait_longer_for_one_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, waiting = (request(prompt(Random(seed), 300)) for seed in (1, 2))
    engine, disks = opened({**await written(hanging), **await written(waiting)})
    monkeypatch.setattr(kv_disk, "_RESTORE_S", 0.02)
    async with asyncio.timeout(60), engine:
        disks.restore_gate.clear()
        answering = asyncio.create_task(answered(engine, hanging))
        await until(lambda: disks.pieces == [18])
        assert await answered(engine, waiting) == wanted(waiting)
        disks.restore_gate.set()
        assert await answering == wanted(hanging)


async def test_a_short_prompt_is_neither_written_nor_looked_for() -> None:
    engine, disks = opened({})
    async with engine:
        generation = request(prompt(Random(1), 100))
        assert await answered(engine, generation) == wanted(generation)
        await asyncio.sleep(0.01)
        assert not disks.kept


async def test_a_full_disk_ends_the_writing_of_a_prompt() -> None:
    engine, disks = opened({}, room=5)
    async with engine:
        generation = request(prompt(Random(1), 300))
        assert await answered(engine, generation) == wanted(generation)
        await saved(disks, 5)
        assert await answered(engine, request(prompt(Random(2), 300)))
        await idle(engine)


@pytest.mark.parametrize("error", [WorkerError("no disk"), LlamaclustError("a mistake")], ids=str)
async def test_a_stage_that_fails_to_read_costs_the_time_alone(error: LlamaclustError) -> None:
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    engine, _ = opened(kept, error=error)
    async with engine:
        assert await answered(engine, generation) == wanted(generation)
        assert engine.scheduler.counts.computed_tokens == 300
        await idle(engine)


async def test_a_disk_that_does_not_answer_ends_the_pipeline() -> None:
    """The stage may still write KV memory, so another pipeline computes the request."""
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    pipeline, owner = FakePipeline(KV_BLOCKS), Losses()
    disks = FakeDisks(pipeline, kept=kept, error=DeadlineError("a disk hangs"))
    pipeline.kv_disks = disks
    disks.engine = engine = Engine(pipeline, SETTINGS, owner=owner)
    async with engine:
        answering = asyncio.create_task(answered(engine, generation))
        async with asyncio.timeout(60):
            await until(lambda: bool(owner.failures))
        other = FakePipeline(KV_BLOCKS)
        other.kv_disks = found = FakeDisks(other, engine, kept)
        engine.resume(other, SETTINGS)
        assert await answering == wanted(generation)
        assert found.restored == 18


async def test_requests_that_wait_are_read_for_a_new_pipeline() -> None:
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    pipeline, owner = FakePipeline(KV_BLOCKS), Losses()
    engine = Engine(pipeline, SETTINGS, owner=owner)
    async with engine:
        pipeline.gate.clear()
        answering = asyncio.create_task(answered(engine, generation))
        async with asyncio.timeout(60):
            await pipeline.taken.wait()
            pipeline.lose(WorkerError("lost"))
            await until(lambda: bool(owner.failures))
        other = FakePipeline(KV_BLOCKS)
        other.kv_disks = found = FakeDisks(other, engine, kept)
        engine.resume(other, SETTINGS)
        assert await answering == wanted(generation)
        assert found.restored == 18


async def test_a_prompt_that_is_being_read_when_layers_move_is_answered() -> None:
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    engine, disks = opened(kept)
    async with engine:
        disks.gate.clear()
        answering = asyncio.create_task(answered(engine, generation))
        async with asyncio.timeout(60):
            await until(lambda: len(engine.scheduler.queues.restoring) == 1)
            other = FakePipeline(KV_BLOCKS)
            other.kv_disks = FakeDisks(other, engine, kept)
            retirement = engine.resume(other, SETTINGS)
            assert retirement is not None
            later = asyncio.create_task(answered(engine, request(prompt(Random(2), 300))))
            assert await later == wanted(request(prompt(Random(2), 300)))
            disks.gate.set()
            assert await answering == wanted(generation)
            await retirement.ended.wait()


@pytest.mark.parametrize("gate", ["gate", "restore_gate"])
async def test_a_prompt_that_is_read_for_too_long_is_computed_by_the_new_pipeline(gate: str) -> None:
    generation = request(prompt(Random(1), 300))
    kept = await written(generation)
    pipeline, other = FakePipeline(KV_BLOCKS), FakePipeline(KV_BLOCKS)
    pipeline.kv_disks = disks = FakeDisks(pipeline, kept=kept)
    disks.engine = engine = Engine(pipeline, SETTINGS, EngineSettings(retirement_s=0.02))
    async with engine:
        getattr(disks, gate).clear()
        answering = asyncio.create_task(answered(engine, generation))
        async with asyncio.timeout(60):
            await until(lambda: disks.found == 1)
            await until(lambda: gate == "gate" or engine.scheduler.queues.memory.transfers.are_under_way)
            retirement = engine.resume(other, SETTINGS)
            assert retirement is not None
            assert await answering == wanted(generation)
            await retirement.ended.wait()
        assert other.microbatches and not pipeline.microbatches


@pytest.mark.parametrize("seed", range(12))
async def test_any_mix_of_requests_gives_the_same_answers(seed: int) -> None:
    """Requests share beginnings or end early in little memory; blocks are read and written while others compute."""
    source = Random(seed)
    beginnings = [prompt(source, source.randrange(130, 300)) for _ in range(3)]
    kept: dict[bytes, list[int]] = {}
    for _ in range(3):
        engine, disks = opened(kept, damaged=set(source.sample(sorted(kept), len(kept) // 10)))
        async with engine:
            generations = [
                request(
                    (*source.choice(beginnings), *prompt(source, source.randrange(1, 60))),
                    source.choice(("", "", "salt")),
                    f"r{number}",
                    source.randrange(1, 40),
                )
                for number in range(12)
            ]
            streams = [engine.submit(generation) for generation in generations]
            ended = source.sample(range(12), 3)
            for number in ended:
                asyncio.get_running_loop().call_later(source.random() / 200, streams[number].abort)
            async with asyncio.timeout(60):
                for number, generation in enumerate(generations):
                    found = tokens_of([event async for event in streams[number]])
                    assert found == wanted(generation)[: len(found)]
                    assert number in ended or found == wanted(generation)
            await idle(engine)
            counts = engine.scheduler.counts
            assert (counts.kv_blocks_held, counts.waiting, counts.running, disks.overwritten) == (0, 0, 0, 0)
