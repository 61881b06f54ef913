"""Tests of preparing the images of several requests: turns of owners, memory of tiles, request deadlines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from llamaclust.cluster.client.http_codec import CHAT
from llamaclust.cluster.front.images import fetching
from llamaclust.cluster.front.text import vision as vision_module
from llamaclust.cluster.front.text.image_rows import RowLeases, RowLimits, Rows
from llamaclust.cluster.front.text.images import ImageSource, PromptImages, image_part
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.front.text.vision import CheckLength, ImagePrompt, Vision, joined_rows
from llamaclust.model.images.preparation import ImageTiles, _Preparer
from llamaclust.model.images.settings import ImageSettings
from support.chat.seeing import any_length, png, prompt_of, seeing, spans_of
from support.chat.vision import TinyVision, data_url, image
from support.clusters import served as served_module
from support.clusters.served import ScriptedEngine, client, make_app, says, until
from support.event_loop import pass_time

_Value = TypeVar("_Value")
ONES, TWOS, THREES = ([png(10 * owner + number) for number in range(6)] for owner in (1, 2, 3))


class Processes:
    """A replacement of image preparation that records each image and blocks until the test lets it go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[bytes] = []
        self.ended = 0
        self._gates: dict[bytes, threading.Event] = {}
        real = _Preparer._prepare

        def prepare(preparer: _Preparer, data: bytes, settings: ImageSettings) -> ImageTiles:
            gate = self._gates.setdefault(data, threading.Event())
            self.begun.append(data)
            assert gate.wait(60)
            try:
                return real(preparer, data, settings)
            finally:
                self.ended += 1

        monkeypatch.setattr(_Preparer, "_prepare", prepare)

    def let_go(self, *images: bytes) -> None:
        for each in images:
            self._gates.setdefault(each, threading.Event()).set()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def for_owner(owner: str, work: Awaitable[Any]) -> asyncio.Task[Any]:
    async def run() -> Any:
        current_owner.set(owner)
        return await work

    return asyncio.create_task(run())


async def test_images_of_a_request_are_prepared_side_by_side_and_no_owner_has_all_processes(
    processes: Processes, tmp_path: Path
) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        first = for_owner("one", spans_of(vision, *ONES))
        other = for_owner("one", spans_of(vision, *reversed(ONES)))
        await until(lambda: len(processes.begun) == 2)
        second = for_owner("two", spans_of(vision, TWOS[0]))
        await until(lambda: len(processes.begun) == 3)
        third = for_owner("three", spans_of(vision, THREES[0]))
        assert {*processes.begun[:2]} < {*ONES} and processes.begun[2] == TWOS[0]
        processes.let_go(processes.begun[0])
        await until(lambda: len(processes.begun) == 4)
        assert processes.begun[3] == THREES[0], "an owner without a place comes first"
        processes.let_go(*ONES, *TWOS, *THREES)
        spans = await first
        assert [span.digest for span in await other] == [
            digest for digest in dict.fromkeys(s.digest for s in reversed(spans)) for s in spans if s.digest == digest
        ]
        await asyncio.gather(second, third)
        assert encoder.images == 8 and sorted(processes.begun) == sorted({*ONES, TWOS[0], THREES[0]})


async def test_the_place_of_an_image_lasts_as_long_as_its_process_works(processes: Processes, tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, *_):
        left = for_owner("one", spans_of(vision, *ONES[:2]))
        await until(lambda: len(processes.begun) == 2)
        left.cancel()
        await asyncio.wait([left])
        later, other = for_owner("one", spans_of(vision, ONES[2])), for_owner("two", spans_of(vision, TWOS[0]))
        await until(lambda: len(processes.begun) == 3)
        assert left.cancelled() and {*processes.begun[:2]} == {*ONES[:2]} and processes.begun[2] == TWOS[0]
        processes.let_go(*ONES, *TWOS)
        assert await later and await other and processes.ended == 4


async def test_an_error_ends_the_images_that_follow(processes: Processes, tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        processes.let_go(b"no image", *ONES)
        with pytest.raises(Exception, match="b'no image'"):
            await spans_of(vision, b"no image", *ONES)
        assert encoder.images == 0 and ONES[1] not in processes.begun


def _is_busy(vision: Vision) -> bool:
    return vision._rows.line.is_busy


async def test_tiles_that_wait_for_the_encoder_count_as_memory(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, *_):
        rows = sum(span.rows.nbytes for span in await spans_of(vision, ONES[0]))
        tiles = (await vision._tiles_of(b"", ImageSource(ONES[0]))).value.nbytes
    for held_bytes, is_taken in ((rows + 2 * tiles, True), (rows + 2 * tiles - 1, False)):
        async with seeing(tmp_path, limits=RowLimits(0, held_bytes)) as (vision, encoder, _):
            encoder.gate.clear()
            first = asyncio.create_task(spans_of(vision, ONES[0]))
            await asyncio.wait_for(encoder.begun.wait(), 60)
            counting = asyncio.create_task(vision.lay_out(prompt_of(ONES[1]), any_length))
            await asyncio.wait((counting,), timeout=None if is_taken else 0)
            if not is_taken:
                await until(partial(_is_busy, vision))
            assert counting.done() is is_taken
            encoder.gate.set()
            assert await first and await counting and not vision._rows.held_bytes


def test_rows_are_those_of_all_tiles() -> None:
    parts = [np.arange(12, dtype=np.float32).reshape(6, 2), np.full((1, 2), -1, np.float32)]
    rows = joined_rows(parts)
    assert rows.base is None and np.array_equal(rows, np.concatenate(parts))


async def test_rows_are_joined_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads: list[threading.Thread] = []

    def joined(parts: Sequence[Rows]) -> Rows:
        threads.append(threading.current_thread())
        return joined_rows(parts)

    monkeypatch.setattr(vision_module, "joined_rows", joined)
    async with seeing(tmp_path) as (vision, *_):
        await spans_of(vision, ONES[0], ONES[1])
    assert len(threads) == 2 and threading.main_thread() not in threads


class SlowVision(TinyVision):
    """A vision model that lays out one prompt of each request and then waits until the request's deadline."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.begun = self.cancelled = 0
        self._monkeypatch = monkeypatch

    async def image_prompt(self, prompt: PromptImages, check: CheckLength, leases: RowLeases) -> ImagePrompt:
        return await self._wait(super().image_prompt(prompt, check, leases))

    async def lay_out(self, prompt: PromptImages, check: CheckLength) -> tuple[int, ...]:
        return await self._wait(super().lay_out(prompt, check))

    async def _wait(self, work: Awaitable[_Value]) -> _Value:
        self.begun += 1
        try:
            found = await work
            pass_time(self._monkeypatch, REQUEST_S)
            await asyncio.Event().wait()
            return found
        finally:
            self.cancelled += 1


REQUEST_S = 30.0
BODY = {"messages": [{"role": "user", "content": [image_part(data_url(image(2)))]}]}


@pytest.mark.parametrize("path", [CHAT, f"{CHAT}/input_tokens"])
@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "a"}])
async def test_the_preparation_of_images_ends_at_the_request_s_deadline(
    path: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)
    engine, vision = ScriptedEngine(says("a")), SlowVision(monkeypatch)
    async with client(make_app(engine, vision=vision, request_s=REQUEST_S), timeout=60) as http:
        reply = await http.post(path, json=BODY, headers=headers)
    assert reply.status_code == 504 and f"(timeouts.request) took longer than {REQUEST_S:g} s" in reply.text, reply.text
    assert vision.begun and vision.cancelled == vision.begun and not engine.submitted


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "a"}])
async def test_rows_are_leased_until_the_end_of_a_request(
    is_streamed: bool, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)
    vision = TinyVision()
    async with client(make_app(ScriptedEngine(says("a")), vision=vision), timeout=60) as http:
        reply = await http.post(CHAT, json={**BODY, "stream": is_streamed}, headers=headers)
        assert reply.status_code == 200, reply.text
        await until(lambda: not vision.leases)
    assert vision.leased == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/messages/count_tokens"])
async def test_fetches_count_in_the_request_s_deadline(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(urls: Sequence[str], most_bytes: int) -> dict[str, bytes]:
        pass_time(monkeypatch, REQUEST_S)
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(fetching, "fetch_images", fetch)
    block = {"type": "image", "source": {"type": "url", "url": "https://example.com/a"}}
    part = image_part("https://example.com/a") if path == CHAT else block
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 9}
    app = make_app(ScriptedEngine(says("a")), vision=TinyVision(), request_s=REQUEST_S, image_hosts=("example.com",))
    async with client(app, timeout=60) as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 504 and "(timeouts.request) took longer than" in reply.text, reply.text
