"""Tests of image tiles on pipelines that fail, are replaced or refuse: rows of an undisturbed encoder, or one error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.control.reconcile import Serve
from llamaclust.cluster.engine.encoder import Encoder
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.pipeline import EncoderUnreachableError, TileTask
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import DeadlineError, LlamaclustError, RequestError, RequestFailedError, WorkerError
from llamaclust.model.projectors.projector import Projector, open_projector
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses
from support.models.vision.tiny_projectors import build_projector
from support.several_models.runner import action_runner, new_store

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=400, kv_blocks=200, max_sequences=8, max_waiting=64)
LOST = WorkerError("worker w1 is lost", worker="w1")
OTHER = WorkerError("worker w2 is lost", worker="w2")


def rows_of(task: TileTask) -> NDArray[np.float32]:
    return np.full((task.rows, task.width), task.tile[0, 0, 0], np.float32)


def tiles(*numbers: int) -> list[NDArray[np.uint8]]:
    """Returns tiles of one colour each, which `rows_of` repeats."""
    return [np.full((8, 16, 3), number, np.uint8) for number in numbers]


@dataclass
class FakeEncoder:
    """An encoder that encodes at once; at the tiles in `stops`, it first calls a function, which may raise."""

    stops: dict[int, Callable[[], None]] = field(default_factory=dict)
    hangs: frozenset[int] = frozenset()
    worker: str | None = "w1"
    begun: list[int] = field(default_factory=list)
    open: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)  # tiles in `hangs` wait for it

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        self.open += 1
        assert self.open == 1, "one tile after the other"
        try:
            number = int(task.tile[0, 0, 0])
            self.begun.append(number)
            self.reached.set()
            await asyncio.sleep(0)
            self.stops.get(number, lambda: None)()
            if number in self.hangs:
                await self.gate.wait()
            return rows_of(task)
        finally:
            self.open -= 1

    async def has_begun(self, *numbers: int) -> None:
        async with asyncio.timeout(60):
            while self.begun != [*numbers]:  # noqa: ASYNC110  few turns
                await asyncio.sleep(0)


async def passes() -> None:
    """Lets the event loop run all that is due."""
    for _ in range(50):
        await asyncio.sleep(0)


def fails(error: LlamaclustError, times: int = 1) -> Callable[[], None]:
    left = [error] * times

    def fail() -> None:
        if left:
            raise left.pop()

    return fail


async def encode(encoder: Encoder, images: Sequence[NDArray[np.uint8]], owner: str) -> list[NDArray[np.float32]]:
    """Encodes one image in its owner's turn."""
    async with encoder.turn(owner):
        return await encoder.encode(images, [owner])


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory) -> Projector:
    return open_projector(build_projector(tmp_path_factory.mktemp("p") / "p.gguf", "qwen3vl_merger"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaclust.cluster.engine.encoder._BACKOFF", Backoff(0.0, 0.0))


def check(found: Sequence[NDArray[np.float32]], *numbers: int) -> None:
    assert [row.shape for row in found] == [(2, 3 * 96)] * len(numbers)
    assert [int(row[0, 0]) for row in found] == [*numbers]


def serving(projector: Projector, fake: FakeEncoder | None, deadline_s: float = 20.0) -> Encoder:
    encoder = Encoder(projector, deadline_s, nullcontext)
    if fake is not None:
        encoder.serve(fake)
    return encoder


async def test_tiles_are_encoded_in_order(projector: Projector) -> None:
    fake = FakeEncoder()
    encoder = serving(projector, fake)
    check(await encode(encoder, [], "o"))
    first, second = await asyncio.gather(encode(encoder, tiles(1, 2), "o"), encode(encoder, tiles(3, 4), "o"))
    check(first, 1, 2)
    check(second, 3, 4)
    assert fake.begun == [1, 2, 3, 4]


async def test_a_failure_repeats_the_tile_alone(projector: Projector) -> None:
    fake = FakeEncoder({2: fails(LOST, MAX_STRIKES - 1), 3: fails(LOST)})
    check(await encode(serving(projector, fake), tiles(1, 2, 3), "o"), 1, 2, 3)
    assert fake.begun == [1, *[2] * MAX_STRIKES, 3, 3]


async def test_a_tile_that_always_fails_ends_the_request_and_not_others(projector: Projector) -> None:
    fake = FakeEncoder({2: fails(LOST, MAX_STRIKES)})
    encoder = serving(projector, fake)
    bad, good = (
        asyncio.create_task(encode(encoder, tiles(1, 2), "o")),
        asyncio.create_task(encode(encoder, tiles(5), "o")),
    )
    with pytest.raises(
        RequestFailedError, match=f"failed {MAX_STRIKES} times on the same tile, the last time with: worker w1 is lost"
    ):
        await bad
    check(await good, 5)


async def test_a_refused_tile_is_not_tried_again(projector: Projector) -> None:
    fake = FakeEncoder({1: fails(RequestError("not this one"))})
    with pytest.raises(RequestError, match=r"^not this one$"):
        await encode(serving(projector, fake), tiles(1), "o")
    assert fake.begun == [1]


async def test_a_tile_of_a_wrong_size_is_not_sent(projector: Projector) -> None:
    fake = FakeEncoder()
    with pytest.raises(RequestError, match=r"multiples of 8 and at most .* pixels, but has 4 x 8"):
        await encode(serving(projector, fake), [*tiles(1), np.zeros((8, 4, 3), np.uint8)], "o")
    assert fake.begun == []


async def test_a_tile_on_a_lost_pipeline_is_encoded_by_the_next_one(projector: Projector) -> None:
    first, second = FakeEncoder(hangs=frozenset((2,))), FakeEncoder()
    encoder = serving(projector, first)
    encoding = asyncio.create_task(encode(encoder, tiles(1, 2), "o"))
    await first.has_begun(1, 2)
    encoder.lose(LOST)
    await passes()
    assert not encoding.done() and first.open == 0
    encoder.serve(second)
    check(await encoding, 1, 2)
    assert second.begun == [2]


async def test_a_move_does_not_disturb_a_tile_in_progress(projector: Projector) -> None:
    first, second = FakeEncoder(hangs=frozenset((1,))), FakeEncoder()
    encoder = serving(projector, first)
    encoding = asyncio.create_task(encode(encoder, tiles(1), "o"))
    await first.reached.wait()
    encoder.serve(second)
    first.gate.set()
    check(await encoding, 1)
    check(await encode(encoder, tiles(2), "o"), 2)
    assert second.begun == [2]


async def test_the_old_stages_of_a_move_are_freed_after_their_tile(projector: Projector) -> None:
    first, second, plan = (
        FakePipeline(200),
        FakePipeline(200),
        SimpleNamespace(no_images="", lacks_kv_memory=False, context_length=64, kv_blocks=4),
    )
    first.encoder, second.encoder = FakeEncoder(hangs=frozenset((1,))), FakeEncoder()
    old, new = (SimpleNamespace(plan=plan, pipeline=of, settings=SETTINGS) for of in (first, second))
    store = new_store()
    runner: Any = action_runner(store, new_store)
    async with asyncio.timeout(60), Engine(first, SETTINGS, EngineSettings(), Losses(), projector) as engine:
        assert engine.encoder is not None
        runner.engine, runner.epoch, runner._loaded = engine, old, new
        encoding = asyncio.create_task(encode(engine.encoder, tiles(1, 2), "o"))
        await first.encoder.reached.wait()
        await runner.run(Serve())
        assert await store.next(None) is Signal.EPOCH_SERVING
        await passes()
        assert store.is_current and not encoding.done() and runner.retiring is old
        first.encoder.gate.set()
        assert await store.next(None) is Signal.RETIRING_EMPTY
        check(await encoding, 1, 2)
        assert (first.encoder.begun, second.encoder.begun) == ([1], [2])


@pytest.mark.parametrize(
    ("loss", "is_strike"), [(LOST, True), (OTHER, False), (WorkerError("?"), False), (None, False)]
)
async def test_only_the_loss_of_its_own_worker_counts_against_a_tile(
    loss: LlamaclustError | None, is_strike: bool, projector: Projector
) -> None:
    encoder, hangs = serving(projector, None), frozenset((1,))
    encoding = asyncio.create_task(encode(encoder, tiles(1), "o"))
    for _ in range(MAX_STRIKES):
        assert not encoding.done()
        fake = FakeEncoder(hangs=hangs)
        encoder.serve(fake)
        await fake.reached.wait()
        encoder.lose(loss)
    encoder.serve(FakeEncoder())
    if is_strike:
        with pytest.raises(RequestFailedError, match="the last time with: the pipeline was lost: worker w1 is lost"):
            await encoding
    else:
        check(await encoding, 1)


async def test_an_encoder_that_is_not_reached_or_was_replaced_counts_nothing_against_a_tile(
    projector: Projector,
) -> None:
    unreachable = fails(EncoderUnreachableError("no way", worker="w1"), 2 * MAX_STRIKES)
    fake = FakeEncoder({1: unreachable})
    encoder = serving(projector, fake)
    check(await encode(encoder, tiles(1), "o"), 1)
    assert fake.begun == [1] * (2 * MAX_STRIKES + 1)
    old = FakeEncoder()

    def replace_then_fail() -> None:
        encoder.serve(old)
        raise LOST

    old.stops[2] = replace_then_fail
    encoder.serve(old)
    encoding = asyncio.create_task(encode(encoder, tiles(2), "o"))
    await old.has_begun(*[2] * (MAX_STRIKES + 3))
    del old.stops[2]
    check(await encoding, 2)


async def test_owners_take_turns_at_each_tile(projector: Projector) -> None:
    """A client's image waits for one tile of another client, not for its hundred images."""
    fake = FakeEncoder(hangs=frozenset((1,)))
    encoder = serving(projector, fake)
    numbers = [*range(1, 101)]
    many = [asyncio.create_task(encode(encoder, tiles(n, n), "many")) for n in numbers]
    await fake.reached.wait()
    ones = [asyncio.create_task(encode(encoder, tiles(n, n), str(n))) for n in (201, 202)]
    await asyncio.sleep(0)
    fake.gate.set()
    await asyncio.gather(*many, *ones)
    assert fake.begun[:8] == [1, 201, 202, 1, 201, 202, 2, 2]
    assert fake.begun[6:] == [number for number in numbers[1:] for _ in range(2)]


async def test_a_paused_encoder_ends_its_tile_and_begins_no_other(projector: Projector) -> None:
    fake, next_one = FakeEncoder(hangs=frozenset((1,))), FakeEncoder()
    encoder = serving(projector, fake)
    await encoder.wait_idle()
    encoding = asyncio.create_task(encode(encoder, tiles(1, 2), "o"))
    await fake.reached.wait()
    encoder.pause()
    idle = asyncio.create_task(encoder.wait_idle())
    await passes()
    assert not idle.done()
    fake.gate.set()
    await idle
    await passes()
    assert fake.begun == [1] and not encoding.done()
    encoder.lose(None)
    encoder.serve(next_one)
    check(await encoding, 1, 2)
    assert next_one.begun == [2], "the first tile is not computed again"


async def test_a_tile_that_hangs_holds_up_no_other_model(
    projector: Projector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llamaclust.cluster.engine.encoder._LAST_TILE_S", 0.05)
    fake, next_one = FakeEncoder(hangs=frozenset((1,))), FakeEncoder()
    encoder = serving(projector, fake)
    encoding = asyncio.create_task(encode(encoder, tiles(1), "o"))
    await fake.reached.wait()
    encoder.pause()
    async with asyncio.timeout(60):
        await encoder.wait_idle()
    assert not encoding.done() and "longer than 0.05 s" in caplog.text
    encoder.lose(None)
    encoder.serve(next_one)
    check(await encoding, 1)


async def test_the_deadline_ends_a_tile(projector: Projector) -> None:
    fake = FakeEncoder(hangs=frozenset((1,)))
    with pytest.raises(DeadlineError, match=r"encoding an image \(timeouts.request\) took longer than 0.05 s"):
        await encode(serving(projector, fake, 0.05), tiles(1), "o")
    assert fake.open == 0
    with pytest.raises(DeadlineError):
        await encode(serving(projector, None, 0.05), tiles(1), "o")


async def test_a_cancelled_call_lets_the_next_one_in(projector: Projector) -> None:
    fake = FakeEncoder(hangs=frozenset((1,)))
    encoder = serving(projector, fake)
    encoding, waiting = (
        asyncio.create_task(encode(encoder, tiles(1), "o")),
        asyncio.create_task(encode(encoder, tiles(2), "o")),
    )
    await fake.reached.wait()
    encoding.cancel()
    check(await waiting, 2)
    assert encoding.cancelled()


async def test_tiles_wait_for_the_engine_s_pipeline(projector: Projector) -> None:
    asleep, awake, later = FakePipeline(1, stages=0), FakePipeline(200), FakePipeline(200)
    awake.encoder, later.encoder = FakeEncoder(hangs=frozenset((3,))), FakeEncoder()
    owner = Losses()
    async with asyncio.timeout(60), Engine(asleep, SETTINGS, EngineSettings(), owner, projector) as engine:
        assert engine.encoder is not None
        encoding = asyncio.create_task(encode(engine.encoder, tiles(1), "o"))
        await passes()
        assert not encoding.done()
        engine.resume(awake, SETTINGS)
        check(await encoding, 1)
        encoding = asyncio.create_task(encode(engine.encoder, tiles(2, 3), "o"))
        await awake.encoder.has_begun(1, 2, 3)
        engine.lane_lost(engine._lane, LOST)
        await passes()
        assert not encoding.done()
        engine.resume(later, SETTINGS)
        check(await encoding, 2, 3)
        assert later.encoder.begun == [3]
        engine.lane_lost(engine._lane, LOST)
        encoding = asyncio.create_task(encode(engine.encoder, tiles(4), "o"))
        await asyncio.sleep(0)
        engine.fail_requests(WorkerError("no worker is left"))
        with pytest.raises(WorkerError, match=r"^no worker is left$"):
            await encoding
        with pytest.raises(WorkerError, match=r"^no worker is left$"):
            await encode(engine.encoder, tiles(4), "o")
        engine.resume(later, SETTINGS)
        check(await encode(engine.encoder, tiles(5), "o"), 5)
    with pytest.raises(WorkerError, match="the cluster is stopping"):
        await encode(engine.encoder, tiles(6), "o")


async def test_an_engine_without_a_projector_has_no_encoder() -> None:
    async with Engine(FakePipeline(200), SETTINGS) as engine:
        assert engine.encoder is None


async def test_a_pipeline_without_an_encoder_refuses_tiles_until_one_has_it(projector: Projector) -> None:
    first, blind, later = FakePipeline(200), FakePipeline(200), FakePipeline(200)
    first.encoder, later.encoder = FakeEncoder(hangs=frozenset((1,))), FakeEncoder()
    blind.no_images = "images are refused: no room"
    async with asyncio.timeout(60), Engine(first, SETTINGS, EngineSettings(), Losses(), projector) as engine:
        assert engine.encoder is not None
        encoding = asyncio.create_task(encode(engine.encoder, tiles(1), "o"))
        await first.encoder.reached.wait()
        engine.lane_lost(engine._lane, LOST)
        engine.resume(blind, SETTINGS)
        for refused in (encoding, encode(engine.encoder, tiles(2), "o")):
            with pytest.raises(WorkerError, match=r"^images are refused: no room$"):
                await refused
        engine.resume(later, SETTINGS)
        check(await encode(engine.encoder, tiles(3), "o"), 3)
