"""Tests an engine that moves to another pipeline while requests run: two lanes give the tokens of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.cluster.engine.failures import PipelineFailure
from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.scheduler.requests import Event, Finished, FinishReason, GenerationRequest
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.core.errors import RequestFailedError, WorkerError
from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from llamaclust.core.sampler.results import NOT_FINITE, RowResult
from llamaclust.wire.microbatch.messages import Result
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses, expected, tokens_of
from support.clusters.served import until
from support.seed import SEED

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=400, kv_blocks=200, max_sequences=8, max_waiting=64)
LOST = WorkerError("worker w1 is lost")


@dataclass
class Lanes:
    engine: Engine
    pipelines: list[FakePipeline]
    settings: SchedulerSettings
    owner: Losses
    _streams: list[tuple[GenerationRequest, asyncio.Task[list[Event]]]] = field(default_factory=list)
    _tokens: int = 0

    @property
    def lost(self) -> list[PipelineFailure]:
        return self.owner.failures

    def start(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self._streams.append((request, asyncio.create_task(self._read(self.engine.submit(request)))))

    async def _read(self, stream: RequestStream) -> list[Event]:
        events = []
        async for event in stream:
            self._tokens += 1
            events.append(event)
        return events

    async def tokens(self, count: int) -> None:
        """Waits until readers have `count` more events."""
        end = self._tokens + count
        while self._tokens < end:  # noqa: ASYNC110  an answer takes few turns
            await asyncio.sleep(0)

    def move(self, stages: int = 3) -> FakePipeline:
        self.pipelines.append(FakePipeline(self.settings.kv_blocks, stages))
        self.engine.resume(self.pipelines[-1], self.settings)
        return self.pipelines[-1]

    async def check(self) -> None:
        """Checks that every request ends with the answer that it has alone."""
        for request, task in self._streams:
            rows, _, reason = expected(request, self.settings.context_length)
            events = await task
            assert tokens_of(events) == [row.token for row in rows]
            assert isinstance(events[-1], Finished) and events[-1].reason is reason
        self._streams.clear()


@asynccontextmanager
async def lanes(settings: SchedulerSettings = SETTINGS, **deadlines: float) -> AsyncIterator[Lanes]:
    pipeline, owner = FakePipeline(settings.kv_blocks), Losses()
    engine = Engine(pipeline, settings, EngineSettings(**deadlines), owner=owner)
    async with asyncio.timeout(60), engine:
        run = Lanes(engine, [pipeline], settings, owner)
        yield run
        await run.check()
        counts = engine.counts
        assert counts.running == counts.waiting == counts.kv_blocks_held == 0
        assert engine.retirement is None and not engine.scheduler.is_shared


async def lose(pipeline: FakePipeline) -> None:
    """Loses a pipeline while something is in flight."""
    pipeline.gate.clear()
    await asyncio.sleep(0.01)
    pipeline.lose(LOST)


def request(number: int, length: int = 40, tokens: int = 150, **fields: object) -> GenerationRequest:
    prompt = tuple((number * 7 + i) % VOCABULARY for i in range(length))
    return GenerationRequest(f"r{number}", prompt, tokens, seed=number, **fields)  # type: ignore[arg-type]


def first_chunks(pipeline: FakePipeline) -> int:
    """Counts the sequences that a pipeline computed from their first token on."""
    return sum(chunk.position == 0 for microbatch in pipeline.microbatches for chunk in microbatch.chunks)


@pytest.mark.parametrize("number", range(6))
async def test_moves_at_any_moment_change_nothing(number: int) -> None:
    print(f"seed {SEED}, {number}")
    source = Random(f"{SEED} {number}")
    mirostat = SamplingParams(chain=SamplerChain(mirostat=2))
    kv_blocks = source.choice((60, 200))
    async with lanes(replace(SETTINGS, kv_blocks=kv_blocks, prefix_cache=source.random() < 0.8)) as run:
        for i in range(30):
            params = source.choice((SamplingParams(), mirostat))
            scored = source.choice((None, 1))
            run.start(
                request(i, source.randrange(1, 120), source.choice((1, 20, 150)), params=params, score_from=scored)
            )
            if source.random() < 0.5:
                await run.tokens(source.randrange(1, 40)) if run.engine.counts.running else None
            if i == 15 or source.random() < 0.2:
                run.move(source.randrange(1, 4))
        assert len(run.pipelines) > 1
        await run.check()
    assert not run.lost


async def test_a_running_sequence_moves_with_little_left_to_compute() -> None:
    async with lanes() as run:
        run.start(request(0, length=100, tokens=250))
        await run.tokens(50)
        new = run.move()
        retirement = run.engine.retirement
        assert retirement is not None
        await retirement.ended.wait()
        await run.tokens(1)
        assert first_chunks(new) == 1, "the copy alone"
        rows = [sum(len(chunk.tokens) for chunk in microbatch.chunks) for microbatch in new.microbatches]
        assert sum(rows) < 100 + 100 + 64, "its prompt and the tokens so far, once"
        assert run.engine.counts.running == 1 and len(run.engine.scheduler.sequences) == 1


async def test_sequences_that_wait_move_at_once() -> None:
    async with lanes() as run:
        old = run.pipelines[0]
        run.start(*map(request, range(8)))
        await run.tokens(20)
        old.gate.clear()
        await run.tokens(0)
        run.start(*map(request, range(8, 12)))
        await asyncio.sleep(0.01)
        assert run.engine.counts.waiting == 4
        new = run.move()
        await asyncio.gather(*(task for _, task in run._streams[8:]))
        assert first_chunks(new) >= 4 and run.engine.retirement is not None
        old.gate.set()


async def test_new_requests_run_on_the_new_pipeline_and_old_ones_stay_without_a_prefix_cache() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        run.start(*map(request, range(4)))
        await run.tokens(40)
        new = run.move()
        run.start(request(9, tokens=5))
        await run.check()
        assert first_chunks(new) == 1


async def test_a_retirement_that_lasts_too_long_ends() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False), retirement_s=0.02) as run:
        run.start(*map(request, range(4)))
        await run.tokens(40)
        run.pipelines[0].gate.clear()
        new, retirement = run.move(), run.engine.retirement
        assert retirement is not None
        await asyncio.sleep(0.05)
        assert not retirement.ended.is_set(), "results are awaited"
        run.pipelines[0].gate.set()
        await retirement.ended.wait()
        await run.check()
        assert first_chunks(new) == 4


async def test_the_loss_of_the_old_pipeline_disturbs_only_its_sequences() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        run.start(*map(request, range(4)))
        await run.tokens(40)
        new, retirement = run.move(), run.engine.retirement
        assert retirement is not None
        run.start(*map(request, range(4, 6)))
        await run.tokens(40)
        await lose(run.pipelines[0])
        await retirement.ended.wait()
        assert retirement.error is LOST and run.engine.state is EngineState.READY
        await run.check()
        assert first_chunks(new) == 6
    assert not run.lost


async def test_after_the_loss_of_the_new_pipeline_all_are_computed_again() -> None:
    async with lanes() as run:
        run.start(*map(request, range(4)))
        await run.tokens(40)
        run.pipelines[0].gate.clear()
        run.move()
        run.start(*map(request, range(4, 6)))
        await run.tokens(20)
        await lose(run.pipelines[1])
        await until(lambda: bool(run.lost))
        assert run.engine.state is EngineState.RECOVERING and run.engine.retirement is None
        assert run.engine.counts.running + run.engine.counts.waiting == 6, "no copy is left"
        run.pipelines[0].gate.set()
        new = run.move()
        assert run.engine.retirement is None
        await run.check()
        assert first_chunks(new) == 6


async def test_an_abort_on_the_old_pipeline_ends_its_retirement() -> None:
    async with lanes() as run:
        stream = run.engine.submit(request(0, tokens=300))
        for _ in range(3):
            await anext(stream)
        run.pipelines[0].gate.clear()
        new = run.move()
        new.gate.clear()
        await asyncio.sleep(0.01)
        retirement = run.engine.retirement
        assert retirement is not None and run.engine.counts.running == 2, "the request and its copy"
        stream.abort()
        assert retirement.ended.is_set() and run.engine.retirement is None
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished) and events[-1].reason is FinishReason.ABORT
        run.start(request(1))
        new.gate.set()


async def test_a_move_without_requests_ends_at_once() -> None:
    async with lanes() as run:
        pipeline = FakePipeline(SETTINGS.kv_blocks)
        retirement = run.engine.resume(pipeline, SETTINGS)
        assert retirement is not None and retirement.ended.is_set()
        run.start(request(1))


async def test_counts_and_stage_times_are_of_both_pipelines_and_the_new_one() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        run.start(*map(request, range(3)))
        await run.tokens(30)
        before = run.engine.counts.computed_tokens
        run.move()
        run.start(request(3, tokens=5))
        await run.tokens(10)
        counts = run.engine.counts
        assert counts.running >= 3 and counts.kv_blocks == 2 * SETTINGS.kv_blocks
        await run.check()
        assert run.engine.counts.computed_tokens == before + 40 == 4 * 40
        assert [report.worker for report in run.engine.metrics.stage_report()] == ["w0", "w1", "w2"]


async def test_a_request_that_fails_on_the_old_pipeline_keeps_its_strikes() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        run.start(request(0, tokens=300))
        await run.tokens(3)
        new = run.move()
        new.gate.clear()
        await lose(run.pipelines[0])
        await until(lambda: run.engine.retirement is None)
        records = run.engine.scheduler.strikes._records
        assert [record.strikes for record in records.values()] == [1]
        new.gate.set()


@pytest.mark.parametrize("first", ["old", "new"])
async def test_requests_on_both_pipelines_may_have_made_their_worker_fail(first: str) -> None:
    """The pipelines share a worker. Whichever notices its end first, no request on either is forgotten."""
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        lost = WorkerError("worker w1 is lost", worker="w1")
        run.start(request(0, tokens=300))
        await run.tokens(3)
        new = run.move()
        run.start(request(1, tokens=300))
        await run.tokens(5)
        new.gate.clear()
        await asyncio.sleep(0.01)
        retirement = run.engine.retirement
        assert retirement is not None
        for lane in (retirement.old, retirement.new) if first == "old" else (retirement.new,):
            run.engine.lane_lost(lane, lost)
        assert len(run.owner.retiring) == (first == "old")
        assert run.lost[0].requests == {1, 2}
        assert [record.strikes for record in run.engine.scheduler.strikes._records.values()] == [1, 1]
        run.move()


async def test_a_member_of_a_group_that_does_not_lead_is_a_worker_of_both_pipelines() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        run.start(request(0, tokens=300))
        await run.tokens(3)
        run.pipelines[0].gate.clear()
        run.pipelines[0].workers |= {"follower"}
        await until(lambda: run.engine.scheduler.in_flight.due is not None)
        run.move()
        run.engine.lane_lost(run.engine._lane, WorkerError("worker follower is lost", worker="follower"))
        assert run.lost[0].requests == {1}
        run.move()


async def test_requests_of_an_earlier_failure_are_no_suspects_once_the_next_pipeline_goes_on() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        lost = WorkerError("worker w1 is lost", worker="w1")
        run.start(request(0, tokens=300))
        await run.tokens(3)
        new = run.move()
        retirement = run.engine.retirement
        assert retirement is not None
        run.engine.lane_lost(retirement.old, lost)
        await run.check()
        new.gate.clear()
        run.start(request(1))
        await until(lambda: run.engine.scheduler.in_flight.due is not None)
        run.engine.lane_lost(run.engine._lane, lost)
        assert run.owner.retiring[0].requests == {1} and run.lost[0].requests == {2}
        run.move()


async def test_a_suspected_request_moves_at_once_so_that_it_stays_alone() -> None:
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        run.start(request(0, tokens=300), request(1, tokens=300))
        for _ in range(2):
            run.pipelines[-1].gate.clear()
            await until(lambda: run.engine.scheduler.in_flight.due is not None)
            run.engine.lane_lost(run.engine._lane, LOST)
            run.move().gate.clear()
        await until(lambda: run.engine.scheduler.in_flight.due is not None)
        run.move()
        assert run.engine.suspects_request and run.engine.retirement is None


@pytest.mark.parametrize("stages", [2, 3])
async def test_a_row_fault_on_the_old_pipeline_excludes_its_worker_from_the_next_one(stages: int) -> None:
    """The worker computes rows of the next pipeline, too, if that has two stages."""
    async with lanes() as run:
        run.owner.may_suspect_workers = True
        run.pipelines[0].gate.clear()
        run.start(request(0, tokens=20))
        old = run.engine.scheduler
        await until(lambda: old.in_flight.due is not None)
        old.sequences[0].failures = 1
        run.move(stages)
        retirement = run.engine.retirement
        assert retirement is not None
        broken = RowResult(-1, float("nan"), failure=NOT_FINITE)
        rows = tuple(broken for taken in old.in_flight.slices(0) for _ in taken.tasks)
        retirement.old._take([Result(1, 0, rows)])
        assert run.engine.retirement is None
        assert [(failure.error.worker, failure.is_repeated) for failure in run.lost] == [("w1", True)] * (stages == 2)
        if run.lost:
            run.move()


async def test_the_owner_learns_which_requests_ended_with_the_old_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaclust.cluster.scheduler.strikes.MAX_STRIKES", 2)
    async with lanes(replace(SETTINGS, prefix_cache=False)) as run:
        stream = run.engine.submit(request(0, tokens=300))
        for _ in range(3):
            await anext(stream)
        for _ in range(2):
            run.pipelines[-1].gate.clear()
            await until(lambda: run.engine.scheduler.in_flight.due is not None)
            run.move().gate.clear()
            retirement = run.engine.retirement
            assert retirement is not None
            run.engine.lane_lost(retirement.old, LOST)
        with pytest.raises(RequestFailedError):
            _ = [event async for event in stream]
        assert [failure.causes for failure in run.owner.retiring] == [set(), {1}]
    assert not run.lost


@pytest.mark.parametrize("last", ["a row alone", "a failed result", "a protocol break"])
async def test_a_row_fault_beside_another_failure_is_not_blamed_on_the_next_pipeline(last: str) -> None:
    """The pipeline fails because of the other result, and no worker of the next pipeline is blamed."""
    async with lanes() as run:
        engine, scheduler = run.engine, run.engine.scheduler
        run.owner.may_suspect_workers = True
        run.pipelines[0].gate.clear()
        run.start(request(0, tokens=20), request(1, tokens=20))
        await until(lambda: scheduler.in_flight.due is not None)
        scheduler.sequences[0].failures = 1
        broken = RowResult(-1, float("nan"), failure=NOT_FINITE)
        rows = tuple(broken for taken in scheduler.in_flight.slices(0) for _ in taken.tasks)
        others = {"a failed result": [Result(1, 1, failure="it broke")], "a protocol break": [Result(1, 7)]}
        engine._lane._take([Result(1, 0, rows), *others.get(last, ())])
        assert [failure.is_repeated for failure in run.lost] == [last == "a row alone"]
        assert run.lost[0].error.worker == ("w0" if last == "a failed result" else "w1")
        run.move()
        await run.check()
        assert len(run.lost) == 1
