"""Tests where the time of requests goes: phases follow each other, and their parts add up."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import fsum
from time import monotonic_ns
from typing import Any

import pytest

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.engine.waterfall import ComputedMicrobatch, PhaseKind, Waterfall
from llamaclust.cluster.engine.waterfall_json import matching, waterfall_json
from llamaclust.cluster.engine.waterfalls import RequestRecord
from llamaclust.cluster.scheduler.requests import GenerationRequest, Timings
from llamaclust.cluster.scheduler.rows.slicing import take_rows
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.core.errors import WorkerError
from llamaclust.wire.microbatch.messages import Chunk, StageTiming
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses
from support.clusters.served import until

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=400, kv_blocks=100, max_sequences=8, max_waiting=4)
STAGES = (StageInfo("a", 0, 3), StageInfo("b", 3, 6))


def request(request_id: str = "abcd0123", length: int = 20, **fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(range(1, length + 1)), max_new_tokens=12, **fields)


def computed(sent_ns: int, done_ns: int, *stages: tuple[int, int, int]) -> ComputedMicrobatch:
    """Makes a microbatch; `stages` has the compute, queue and wire times of each stage."""
    timings = tuple(StageTiming(queue, compute, wire, 1) for compute, queue, wire in stages)
    return ComputedMicrobatch.of(STAGES, timings, sent_ns, done_ns)


def kinds(waterfall: Waterfall) -> list[tuple[str, int]]:
    return [(str(phase.kind), phase.ns) for phase in waterfall.phases]


async def read(stream: RequestStream) -> None:
    async for _ in stream:
        pass


def test_phases_follow_each_other_and_their_parts_add_up() -> None:
    sequence = Sequence(1, request(), 12, Usage(1000))
    waterfall = Waterfall(400, 1000, 20)
    first, second = take_rows(sequence, 16), take_rows(sequence, 4)
    waterfall.add(computed(1500, 2500, (300, 100, 50), (200, 50, 100)), first.chunk)
    waterfall.add(computed(1600, 2900, (600, 0, 0), (600, 0, 0)), second.chunk)  # sent before the first result
    waterfall.add(computed(3000, 3600, (200, 0, 0), (100, 0, 0)), Chunk((5,), 20, (), 0))
    assert kinds(waterfall) == [("preparation", 600), ("waiting", 500), ("prefill", 1400), ("decode", 700)]
    prefill, decode = list(waterfall.phases)[2:]
    assert (prefill.start_ns, prefill.tokens, prefill.microbatches, prefill.idle_ns) == (1500, 20, 2, 0)
    assert prefill.stages_ns == [300 + 200, 100, 50, 200 + 200, 50, 100]  # 400 ns, divided like the second one's 1200
    assert prefill.links_ns == 200
    assert (decode.idle_ns, decode.links_ns, decode.stages_ns) == (100, 300, [200, 0, 0, 100, 0, 0])


def test_what_was_computed_before_is_computed_again() -> None:
    sequence = Sequence(1, request(), 12, Usage(0))
    waterfall = Waterfall(0, 0, 20)
    waterfall.add(computed(0, 10), take_rows(sequence, 20).chunk)
    waterfall.pass_until(15)
    waterfall.pass_until(100, PhaseKind.RECOVERY)
    sequence.restart()
    waterfall.add(computed(110, 130), take_rows(sequence, 20).chunk)
    waterfall.pass_until(140)
    assert kinds(waterfall) == [("prefill", 15), ("recovery", 85), ("waiting", 10), ("recomputation", 30)]


def test_interruptions_without_end_are_few_phases() -> None:
    waterfall = Waterfall(0, 0, 20)
    for at in range(0, 10_000, 20):
        waterfall.pass_until(at + 10, PhaseKind.RECOVERY)
        waterfall.pass_until(at + 20, PhaseKind.WAITING)
    assert len(waterfall.phases) <= 64 and sum(phase.ns for phase in waterfall.phases) == 10_000


async def test_requests_of_an_engine_are_known_while_they_run_and_afterwards() -> None:
    pipeline = FakePipeline(SETTINGS.kv_blocks)
    async with asyncio.timeout(60), Engine(pipeline, SETTINGS) as engine:
        pipeline.gate.clear()
        stream = engine.submit(request(received_ns=monotonic_ns() - 1_000_000))
        await pipeline.taken.wait()
        (running,) = engine.waterfalls.records(monotonic_ns())
        assert running.end is None and running.seconds > 0.001
        pipeline.gate.set()
        await read(stream)
        await read(engine.submit(request("ffff4567")))
        records = engine.waterfalls.records(monotonic_ns())
    assert [(record.request_id, record.end) for record in records] == [("abcd0123", "length"), ("ffff4567", "length")]
    for record in records:
        shown = waterfall_json(record, {})
        *_, prefill, decode = shown["phases"]
        assert (prefill["phase"], decode["phase"], decode["tokens"]) == ("prefill", "decode", 11)
        assert [stage["worker"] for stage in decode["stages"]] == ["w0", "w1"]
        assert fsum(phase["seconds"] for phase in shown["phases"]) == pytest.approx(record.seconds)
        for phase in (prefill, decode):
            stages = (stage[part] for stage in phase["stages"] for part in ("compute", "queue", "send"))
            assert fsum((phase["links"], phase["idle"], *stages)) == pytest.approx(phase["seconds"])
    assert shown["cached_tokens"] == 16 and prefill["tokens"] == 4
    for name in ("ffff4567", "chatcmpl-ffff4567", "resp_ffff45", "ffff4567-1"):
        assert matching(records, name) == records[1:]
    assert matching(records, "none") == []


def test_what_an_id_is_beyond_its_shown_characters_cannot_be_found_out() -> None:
    """Guesses of one more character at a time do not reveal an id."""
    ids, timings = ("0123456789abcdef01234567", "ffff4567"), Timings(0.0, 0.0, 0.0, 0.0, 20, 0, 0)
    records = [RequestRecord(request_id, None, 0.0, timings, Waterfall(0, 0, 20)) for request_id in ids]
    for guess in "0123456789abcdef":
        assert matching(records, f"chatcmpl-01234567{guess}") == records[:1]
    assert matching(records, "0123") == records[:1]
    assert matching(records, "012") == matching(records, "f") == []


async def test_a_load_is_a_phase_of_the_requests_that_wait_for_it() -> None:
    async with asyncio.timeout(60), Engine(FakePipeline(SETTINGS.kv_blocks, stages=0), SETTINGS) as engine:
        stream = engine.submit(request())
        engine.resume(FakePipeline(SETTINGS.kv_blocks), SETTINGS)
        await read(stream)
        assert engine.sleep()
        later = engine.submit(request("ffff4567"))
        engine.resume(FakePipeline(SETTINGS.kv_blocks), SETTINGS)
        await read(later)
        records = engine.waterfalls.records(monotonic_ns())
    for record in records:
        names = [str(phase.kind) for phase in record.waterfall.phases if phase.kind is not PhaseKind.WAITING]
        assert names[-3:] == ["loading", "prefill", "decode"]


async def test_adapters_of_a_request_are_known_by_their_names() -> None:
    settings = replace(SETTINGS, adapters={0: "ab", 1: "cd"})
    async with asyncio.timeout(60), Engine(FakePipeline(SETTINGS.kv_blocks), settings) as engine:
        await read(engine.submit(request(adapters=((0, 1.0), (1, 0.5)))))
        await read(engine.submit(request("ffff4567")))
        chosen, plain = (
            waterfall_json(record, {0: "poet", 1: "clerk"}) for record in engine.waterfalls.records(monotonic_ns())
        )
    assert chosen["adapters"] == [{"name": "poet", "scale": 1.0}, {"name": "clerk", "scale": 0.5}]
    assert plain["adapters"] == []


async def test_a_loss_is_a_phase_of_the_requests_that_it_interrupts() -> None:
    owner = Losses()
    pipeline = FakePipeline(SETTINGS.kv_blocks)
    async with asyncio.timeout(60), Engine(pipeline, SETTINGS, owner=owner) as engine:
        stream = engine.submit(request())
        for _ in range(3):
            await anext(stream)
        pipeline.lose(WorkerError("w1 is gone"))
        await until(lambda: bool(owner.failures))
        engine.submit(request("ffff4567")).abort()
        engine.resume(FakePipeline(SETTINGS.kv_blocks, stages=3), SETTINGS)
        await read(stream)
        during, whole = engine.waterfalls.records(monotonic_ns())
    assert {phase.kind for phase in during.waterfall.phases} <= {PhaseKind.RECOVERY}
    names = [str(phase.kind) for phase in whole.waterfall.phases if phase.kind is not PhaseKind.WAITING]
    assert names == ["prefill", "decode", "recovery", "recomputation", "decode"]
    assert [len(phase.stages) for phase in whole.waterfall.phases if phase.stages] == [2, 2, 3, 3]
