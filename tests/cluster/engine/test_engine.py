from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic_ns
from unittest.mock import Mock

import pytest

from llamaclust.cluster.engine.engine import Engine, EngineState, _done_ns
from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.scheduler.requests import Event, Finished, FinishReason, GenerationRequest, PromptScored
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.core.errors import DeadlineError, LlamaclustError, QueueFullError, RequestError, WorkerError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sampler.results import NOT_FINITE, RowResult
from llamaclust.wire.microbatch.messages import Result, StageTiming
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses, expected, linear, tokens_of
from support.clusters.served import until
from support.event_loop import pass_time

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=400, kv_blocks=100, max_sequences=8, max_waiting=4)
COMPLETIONS = '{operation="text_completion"}'


@asynccontextmanager
async def running(stages: int = 2, **deadlines: float) -> AsyncIterator[tuple[Engine, FakePipeline]]:
    pipeline = FakePipeline(SETTINGS.kv_blocks, stages)
    async with Engine(pipeline, SETTINGS, EngineSettings(**deadlines)) as engine:
        yield engine, pipeline
        if engine.state is EngineState.READY:
            assert engine.scheduler.counts.kv_blocks_held == 0


def generation(seed: int = 0, length: int = 20, max_new_tokens: int = 30, **fields: object) -> GenerationRequest:
    return GenerationRequest("r", tuple(range(1, length + 1)), max_new_tokens, seed=seed, **fields)  # type: ignore[arg-type]


async def collect(stream: RequestStream) -> list[Event]:
    return [event async for event in stream]


async def test_requests_together_give_what_each_gives_alone() -> None:
    async with running() as (engine, _):
        requests = [generation(seed, length=5 + 13 * seed) for seed in range(8)]
        answers = await asyncio.gather(*(collect(engine.submit(request)) for request in requests))
        for request, events in zip(requests, answers, strict=True):
            rows, _, reason = expected(request, SETTINGS.context_length)
            assert tokens_of(events) == [row.token for row in rows]
            last = events[-1]
            assert isinstance(last, Finished) and last.reason is reason
            assert last.timings.prompt_tokens == len(request.prompt)
            assert last.timings.generated_tokens == 30
            assert last.timings.ttft_ms > 0 and last.timings.decode_tok_s > 0


async def test_results_that_come_together_are_those_that_come_alone() -> None:
    """A pipeline of one stage has several decode steps in flight."""
    async with running(stages=1) as (engine, pipeline):
        pipeline.together, pipeline.fake.stage_ns = 7, [linear(1, 0)]
        requests = [generation(seed, length=5 + 13 * seed, max_new_tokens=20 + 9 * seed) for seed in range(4)]
        answers = await asyncio.gather(*(collect(engine.submit(request)) for request in requests))
        for request, events in zip(requests, answers, strict=True):
            assert tokens_of(events) == [row.token for row in expected(request, SETTINGS.context_length)[0]]
        assert pipeline.most_together > 3


def test_results_that_came_together_were_computed_one_after_the_other() -> None:
    results = [Result(1, number, timings=(StageTiming(9, ns, 9, 1),)) for number, ns in enumerate((1000, 7, 20))]
    assert _done_ns(results, 100) == [73, 80, 100]


@pytest.mark.parametrize("breaks_protocol", [False, True])
async def test_what_came_before_a_failure_and_with_it_counts(breaks_protocol: bool) -> None:
    async with running(stages=1) as (engine, pipeline):
        pipeline.together, pipeline.fake.stage_ns = 50, [linear(1, 0)]
        if breaks_protocol:
            pipeline.without_rows = 23
        else:
            pipeline.failures[23] = "it broke"
        events: list[Event] = []
        with pytest.raises(LlamaclustError, match=r"it broke|came back with 0 results"):
            async for event in engine.submit(request := generation(max_new_tokens=60)):
                events.append(event)
        assert tokens_of(events) == [row.token for row in expected(request, SETTINGS.context_length)[0]][:23]
        assert pipeline.most_together > 3


async def test_scoring_and_nothing_to_do() -> None:
    async with running() as (engine, _):
        events = await collect(engine.submit(generation(max_new_tokens=0, score_from=0)))
        scored = [row for event in events if isinstance(event, PromptScored) for row in event.rows]
        assert [row.token for row in scored] == list(range(2, 21))
        events = await collect(engine.submit(generation(max_new_tokens=0)))
        (last,) = events
        assert isinstance(last, Finished) and (last.timings.queue_ms, last.timings.ttft_ms) == (0.0, 0.0)


async def test_aborted_while_it_waits_it_has_taken_no_time() -> None:
    async with running() as (engine, _):
        stream = engine.submit(generation())
        stream.abort()
        (last,) = await collect(stream)
        assert isinstance(last, Finished) and last.reason is FinishReason.ABORT
        assert (last.timings.queue_ms, last.timings.ttft_ms) == (0.0, 0.0)


async def test_refusals_reach_the_caller_at_once() -> None:
    async with running() as (engine, pipeline):
        with pytest.raises(RequestError, match="empty"):
            engine.submit(generation(length=0))
        pipeline.gate.clear()
        streams = [engine.submit(generation(seed)) for seed in range(12)]
        with pytest.raises(QueueFullError):
            engine.submit(generation())
        pipeline.gate.set()
        for events in await asyncio.gather(*map(collect, streams)):
            assert len(tokens_of(events)) == 30


async def test_abort_frees_memory_at_once_and_ends_the_stream() -> None:
    async with running() as (engine, _):
        stream = engine.submit(generation(max_new_tokens=300))
        seen = [await anext(stream) for _ in range(3)]
        assert engine.scheduler.counts.kv_blocks_held > 0
        stream.abort()
        assert engine.scheduler.counts.kv_blocks_held == 0
        events = await collect(stream)
        last = events[-1]
        assert isinstance(last, Finished) and last.reason is FinishReason.ABORT
        assert len(tokens_of([*seen, *events])) == last.timings.generated_tokens
        stream.abort()


@pytest.mark.parametrize("way", ["cancelled", "left"])
async def test_a_cancelled_reader_frees_memory(way: str) -> None:
    async with running() as (engine, pipeline):
        stream = engine.submit(generation(max_new_tokens=300))
        await anext(stream)
        if way == "cancelled":
            pipeline.gate.clear()
            task = asyncio.ensure_future(collect(stream))
            for _ in range(10):  # until the task waits
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            pipeline.gate.set()
        else:
            async with stream:
                await anext(stream)
        assert engine.scheduler.counts.kv_blocks_held == 0
        assert not engine.scheduler.sequences


async def failing(
    engine: Engine, pipeline: FakePipeline, break_it: Callable[[], None], kind: type[LlamaclustError]
) -> str:
    pipeline.gate.clear()
    streams = [engine.submit(generation(seed)) for seed in range(12)]
    await pipeline.taken.wait()
    break_it()
    answers = await asyncio.gather(*map(collect, streams), return_exceptions=True)
    messages = {str(answer) for answer in answers}
    assert all(isinstance(answer, kind) for answer in answers), answers
    assert len(messages) == 1
    assert engine.state is EngineState.DOWN
    with pytest.raises(WorkerError, match=re.escape(next(iter(messages)))):
        engine.submit(generation())
    return messages.pop()


async def test_a_lost_worker_fails_every_request_by_name() -> None:
    async with running() as (engine, pipeline):
        message = "worker w1 (layers 2-3) is lost: killed"
        assert await failing(engine, pipeline, lambda: pipeline.lose(WorkerError(message)), WorkerError) == message


async def test_a_failed_microbatch_closes_the_engine() -> None:
    async with running() as (engine, pipeline):
        pipeline.failure = "worker w0: out of memory"
        assert "out of memory" in await failing(engine, pipeline, pipeline.gate.set, WorkerError)


async def test_a_result_out_of_order_closes_the_engine() -> None:
    async with running() as (engine, pipeline):
        pipeline.replaced = Result(1, 77)
        assert "microbatch 77" in await failing(engine, pipeline, pipeline.gate.set, LlamaclustError)


async def test_a_missing_result_closes_the_engine() -> None:
    async with running(result_s=0.02, watch_s=0.01) as (engine, pipeline):
        message = await failing(engine, pipeline, lambda: None, DeadlineError)
        assert "returned no result of a microbatch for" in message and "w0 (layers 0-1)" in message


async def test_a_request_ends_at_its_deadline_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(request_s=600.0) as (engine, pipeline):
        pipeline.gate.clear()
        answer = asyncio.create_task(collect(engine.submit(generation())))
        await asyncio.sleep(0)
        pass_time(monkeypatch, 600.0)
        with pytest.raises(DeadlineError, match=r"longer than 600 s \(timeouts.request\)"):
            await answer
        pipeline.gate.set()
        assert len(tokens_of(await collect(engine.submit(generation(1))))) == 30


async def test_the_time_before_a_submission_counts_in_the_deadline() -> None:
    async with running(request_s=600.0) as (engine, pipeline):
        pipeline.gate.clear()
        late, early = (generation(received_ns=monotonic_ns() - round(passed_s * 1e9)) for passed_s in (601, 300))
        answer = asyncio.create_task(collect(engine.submit(early)))
        with pytest.raises(DeadlineError, match=r"longer than 600 s \(timeouts.request\)"):
            await collect(engine.submit(late))
        pipeline.gate.set()
        assert len(tokens_of(await answer)) == 30


async def test_draining_finishes_accepted_requests() -> None:
    async with running() as (engine, pipeline):
        stream = engine.submit(generation())
        pipeline.gate.clear()
        assert not await engine.drain(0.01)
        later = engine.submit(generation(choice=1))
        pipeline.gate.set()
        *answers, drained = await asyncio.gather(collect(stream), collect(later), engine.drain(10))
        assert drained and [len(tokens_of(events)) for events in answers] == [30, 30]


async def test_closing_the_engine_ends_every_stream() -> None:
    pipeline = FakePipeline(SETTINGS.kv_blocks)
    pipeline.gate.clear()
    async with Engine(pipeline, SETTINGS) as engine:
        stream = engine.submit(generation())
        await pipeline.taken.wait()
    with pytest.raises(WorkerError, match="the cluster is stopping"):
        await collect(stream)
    assert engine.scheduler.counts.kv_blocks_held == 0


async def test_an_engine_that_was_down_when_a_launch_was_due_serves_again() -> None:
    owner = Losses()
    pipeline, error = FakePipeline(SETTINGS.kv_blocks), WorkerError("worker w1 is lost")
    async with asyncio.timeout(60), Engine(pipeline, SETTINGS, owner=owner) as engine:
        failed = engine.submit(generation())
        engine.interrupt_pipeline(error)
        engine.fail_requests(error)
        with pytest.raises(WorkerError, match="worker w1 is lost"):
            await collect(failed)
        await asyncio.sleep(0)  # the launch that is due runs
        engine.resume(FakePipeline(SETTINGS.kv_blocks), SETTINGS)
        assert len(tokens_of(await collect(engine.submit(generation(1))))) == 30
    assert [failure.error for failure in owner.failures] == [error]


async def test_metrics_and_stage_report() -> None:
    async with running() as (engine, _):
        await asyncio.gather(*(collect(engine.submit(generation(seed))) for seed in range(3)))
        engine.submit(replace(generation(), request_id="x")).abort()
        engine.begin(generation(), Mock()).abort(FinishReason.STOP)
        text = engine.metrics.render().decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert values['llamaclust_requests_total{finish_reason="length"}'] == "3.0"
        assert [values[f'llamaclust_requests_total{{finish_reason="{each}"}}'] for each in ("abort", "stop")] == [
            "1.0"
        ] * 2
        assert float(values["llamaclust_generated_tokens_total"]) == 90
        assert float(values[f"llamaclust_time_to_first_token_seconds_count{COMPLETIONS}"]) == 3
        assert float(values['llamaclust_kv_blocks{state="free"}']) == SETTINGS.kv_blocks
        assert float(values['llamaclust_stage_compute_seconds_total{stage="1",worker="w1"}']) > 0
        assert float(values["llamaclust_prefix_cache_hit_tokens_total"]) == 32
        first, second = engine.metrics.stage_report()
        assert (first.worker, first.layers, second.worker) == ("w0", (0, 2), "w1")
        assert first.microbatches == second.microbatches > 29
        assert 0 < first.utilization <= 1 and first.compute_ms > 0.1 and first.tokens_per_s > 0


@pytest.mark.parametrize(
    ("row", "speaks"),
    [
        (RowResult(-1, math.nan, failure=NOT_FINITE), True),
        (RowResult(-1, math.nan, failure=NOT_FINITE, is_request_fault=True), False),
        (RowResult(-1, math.nan, failure="the grammar was not ready in 60 s"), False),
    ],
    ids=["not finite", "the request's fault", "a matcher that was not ready"],
)
async def test_only_rows_that_no_worker_gives_speak_for_the_one_that_was_suspected(
    row: RowResult, *, speaks: bool
) -> None:
    """Two failures suspect the last stage's worker; the third one comes from another worker."""
    owner, broken = Losses(may_suspect_workers=True), RowResult(-1, math.nan, failure=NOT_FINITE)
    first, second = AnsweringPipeline(broken), AnsweringPipeline(row)
    grammar = Grammar("{}") if row.failure != NOT_FINITE else None
    async with Engine(first, SETTINGS, owner=owner) as engine:
        reading = asyncio.create_task(collect(engine.submit(generation(grammar=grammar))))
        await until(lambda: bool(owner.failures))
        assert [failure.error.worker for failure in owner.failures] == ["w1"] and not owner.ended_rows
        engine.resume(second, SETTINGS)
        with pytest.raises(LlamaclustError, match=str(row.failure)):
            await reading
    assert len(owner.failures) == 1 and len(owner.ended_rows) == speaks


class AnsweringPipeline(FakePipeline):
    """A pipeline whose rows all have this result."""

    def __init__(self, row: RowResult) -> None:
        super().__init__(SETTINGS.kv_blocks)
        self._row = row

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        for each in scheduled:
            rows = (self._row,) * len(each.inputs.tasks)
            self._results.put_nowait(Result(self.epoch, each.microbatch.number, rows))
