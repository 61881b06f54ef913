"""Checks that a stream sends comments to its client while its images are still being encoded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from llamaclust.cluster.client.http_codec import CHAT
from llamaclust.cluster.front.http.responses import CLIENT_GONE
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.images import PromptImages, image_part
from llamaclust.cluster.front.text.vision import CheckLength, ImagePrompt
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, read_journal
from llamaclust.core.errors import LlamaclustError, RequestError
from support.chat.vision import TinyVision, data_url, image
from support.clusters import served as served_module
from support.clusters.resumable import SERVED, admission, write_journal
from support.clusters.served import ScriptedEngine, client, make_app, says, serving, until

BODY = {"messages": [{"role": "user", "content": [image_part(data_url(image(2)))]}], "stream": True}
KEPT = {"idempotency-key": "a"}
COMMENT = ": waiting"


class GatedVision(TinyVision):
    """A vision model that encodes images, or raises `error`, when its gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.begun = self.cancelled = 0

    async def image_prompt(self, prompt: PromptImages, check: CheckLength, leases: RowLeases) -> ImagePrompt:
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return await super().image_prompt(prompt, check, leases)


@asynccontextmanager
async def served(
    engine: ScriptedEngine, vision: GatedVision, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)
    app = make_app(engine, vision=vision, **{"keepalive_s": 0.02, **settings})
    async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=60) as http:
        yield http


@pytest.mark.parametrize("headers", [{}, KEPT])
async def test_a_stream_has_comments_while_its_images_are_encoded(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, vision = ScriptedEngine(says("a")), GatedVision()
    async with served(engine, vision, monkeypatch, prepare_s=0.02) as http:
        async with http.stream("POST", CHAT, json=BODY, headers=headers) as reply:
            assert reply.status_code == 200
            lines = reply.aiter_lines()
            assert [await anext(lines) for _ in range(4)] == [COMMENT, ""] * 2 and not engine.submitted
            vision.gate.set()
            slow = [line async for line in lines if line.startswith("data: ")]
        quick = (await http.post(CHAT, json=BODY)).text
    assert slow[-1] == "data: [DONE]" and len(slow) == quick.count("data: ") and not vision.leases


async def test_the_first_comment_follows_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = GatedVision()
    async with (
        served(ScriptedEngine(says("a")), vision, monkeypatch, prepare_s=0.02, keepalive_s=600.0) as http,
        http.stream("POST", CHAT, json=BODY) as reply,
    ):
        lines = reply.aiter_lines()
        assert await anext(lines) == COMMENT
        vision.gate.set()
        assert COMMENT not in [line async for line in lines]


@pytest.mark.parametrize("headers", [{}, KEPT])
@pytest.mark.parametrize(
    ("error", "says_"), [(RequestError("the image is damaged"), "the image is damaged"), (KeyError("x"), "internal")]
)
async def test_an_error_after_the_head_is_an_event_and_another_attempt_begins_anew(
    error: Exception, says_: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, vision = ScriptedEngine(says("a")), GatedVision()
    vision.error = error
    async with served(engine, vision, monkeypatch, prepare_s=0.02) as http:
        async with http.stream("POST", CHAT, json=BODY, headers=headers) as reply:
            assert reply.status_code == 200
            lines = reply.aiter_lines()
            assert await anext(lines) == COMMENT
            vision.gate.set()
            rest = [line async for line in lines if line.startswith("data: ")]
        assert len(rest) == 1 and '"error"' in rest[0] and says_ in rest[0] and not engine.submitted
        vision.error = None
        again = await http.post(CHAT, json=BODY, headers=headers)
        assert again.status_code == 200 and "[DONE]" in again.text and vision.begun == 2


async def test_an_error_before_the_head_sets_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = GatedVision()
    vision.error = LlamaclustError("no encoder")
    vision.gate.set()
    async with served(ScriptedEngine(says("a")), vision, monkeypatch, prepare_s=600.0) as http:
        reply = await http.post(CHAT, json=BODY)
    assert reply.status_code == 500 and "no encoder" in reply.text


async def test_a_client_that_leaves_during_the_comments_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, vision = ScriptedEngine(says("a")), GatedVision()
    async with served(engine, vision, monkeypatch, prepare_s=0.02) as http:
        async with http.stream("POST", CHAT, json=BODY) as reply:
            lines = reply.aiter_lines()  # an iterator that nothing refers to closes the connection
            assert await anext(lines) == COMMENT
            await until(lambda: vision.begun == 1)  # a first request may load modules for longer than prepare_s
        await until(lambda: vision.cancelled == 1)
    assert not engine.submitted


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_kept_reply_is_prepared_without_its_first_client(
    is_streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)
    vision, body, has_more = GatedVision(), {**BODY, "stream": is_streamed}, True
    app = make_app(ScriptedEngine(says("a")), vision=vision)

    async def leaving(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_end() -> Message:
            nonlocal has_more
            if has_more:
                message = await receive()
                has_more = message.get("more_body", False)
                return message
            await until(lambda: vision.begun == 1)
            return {"type": "http.disconnect"}

        await app(scope, receive_end, send)

    async with client(leaving) as first, client(app) as second:
        assert (await first.post(CHAT, json=body, headers=KEPT)).status_code == CLIENT_GONE
        vision.gate.set()
        assert (await second.post(CHAT, json=body, headers=KEPT)).status_code == 200
    assert (vision.begun, vision.cancelled) == (1, 0)


async def test_a_restored_request_that_is_stopped_ends_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "CONTEXT", 1 << 14)
    path, engine, vision = tmp_path / "journal", ScriptedEngine(says("a")), GatedVision()
    await write_journal(path, admission(1, json.dumps(BODY), endpoint=f"/{CHAT}"))
    left = read_journal(path, Instant.now())
    async with (
        aclosing(Journal(path, ControlRecord(), 60.0)) as journal,
        aclosing(Replies(ApiSettings(digest=SERVED, request_s=60.0), journal)) as replies,
        client(make_app(engine, replies=replies, vision=vision)) as http,
    ):
        await replies.restore(left)
        await until(lambda: vision.begun == 1)
        assert (await http.delete("/v1/streams/key 1")).status_code == 204
        assert vision.cancelled == 1
        vision.gate.set()
    assert not (engine.submitted or vision.leases)
