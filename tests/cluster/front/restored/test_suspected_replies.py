"""Checks that restored requests that may have ended earlier coordinators are counted, begun last and finally failed."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.front.dialects.openai.endpoints import TextCompletions
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext, read_journal
from support.clusters.fakes import FakePipeline
from support.clusters.resumable import (
    PATHS,
    KilledJournal,
    admission,
    body_of,
    served,
    stream,
    write_journal,
)
from support.clusters.served import until


async def test_a_request_that_ends_the_coordinator_again_and_again_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests a fatal request that is begun before the others at first and after them later."""
    path, create, lives = tmp_path / "journal", TextCompletions.make, 0
    body, poison = json.dumps(body_of(PATHS[0])), json.dumps(body_of(PATHS[0], prompt="poison"))
    await write_journal(path, *(admission(number, poison if number == 1 else body) for number in range(4)))
    is_over = asyncio.Event()

    async def deadly(self: TextCompletions, data: bytes, context: RequestContext) -> Reply:
        if b"poison" in data:
            is_over.set()
            await asyncio.Event().wait()
        return await create(self, data, context)

    monkeypatch.setattr(TextCompletions, "make", deadly)
    while not lives or is_over.is_set():
        is_over.clear()
        async with served(path, KilledJournal) as server:
            async with asyncio.timeout(60):
                poisoned = asyncio.create_task(server.http.get("/v1/streams/key 1"))
                await asyncio.wait([asyncio.create_task(is_over.wait()), poisoned], return_when="FIRST_COMPLETED")
                if poisoned.done():
                    break
                poisoned.cancel()
                if lives >= 2:  # the others are computed first
                    for number in (0, 2, 3):
                        assert (await stream(server.http, "GET", f"/v1/streams/key {number}"))[-1][1] == "[DONE]"
            lives += 1
    assert lives == 10
    assert '"code":"request_failed"' in poisoned.result().text
    assert "the coordinator ended 10 times during this request, which at last ran alone" in poisoned.result().text


async def test_a_suspected_request_begins_after_the_others_progressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the order, without which a kill during the others' prompts would count against the suspected request."""
    path, begun, body = tmp_path / "journal", list[str](), json.dumps(body_of(PATHS[0]))
    create, open_pipeline = TextCompletions.make, FakePipeline.__init__
    async with aclosing(Journal(path, ControlRecord(), 60.0)) as journal:
        for number in range(2):
            await journal.admit(admission(number, body))
        await journal.begin_restored({f"{0:024x}": 1})

    def closed(self: FakePipeline, *given: Any, **more: Any) -> None:
        open_pipeline(self, *given, **more)
        self.gate.clear()

    async def seen(self: TextCompletions, data: bytes, context: RequestContext) -> Reply:
        begun.append(context.idempotency_key)
        return await create(self, data, context)

    monkeypatch.setattr(FakePipeline, "__init__", closed)
    monkeypatch.setattr(TextCompletions, "make", seen)
    async with served(path) as server:
        await until(lambda: server.engine.scheduler.counts.running == 1)
        for _ in range(50):
            assert (await server.http.get("/live")).status_code == 200 and begun == ["key 1"]
        server.pipeline.gate.set()
        await until(lambda: begun == ["key 1", "key 0"])


async def test_a_restored_request_that_progresses_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends several coordinators, each of which adds tokens that the next one does not compute again."""
    path, known = tmp_path / "journal", list[int]()
    await write_journal(path, admission(0, json.dumps(body_of(PATHS[0]))))
    for _ in range(7):
        async with served(path, KilledJournal) as server:
            await stream(server.http, "GET", "/v1/streams/key 0", most=sum(known) + 3)
        (request,) = read_journal(path, Instant.now())
        assert request.restores == 0
        known.append(len(request.answered[0, 0]) - sum(known))
        assert known[-1] > 0
        if sum(known) > 60:
            break
