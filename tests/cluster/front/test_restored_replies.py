"""Tests of replies from an earlier coordinator's journal, computed at the start or when their clients come back."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.front.replies import handlers, kept_reply
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Reply
from llamaclust.cluster.front.text.completion import Completion
from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.request import ChatRequest, CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.journal_records import Instant, read_journal
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import DeadlineError, QueueFullError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampler.matchers import Grammar
from support.clusters.resumable import (
    KEY,
    PATHS,
    KilledJournal,
    admission,
    assert_same,
    body_of,
    is_idle,
    served,
    stream,
    write_journal,
)
from support.clusters.served import ScriptedEngine, client, make_app, says, until
from support.seed import SEED

GRAMMAR = Grammar("{}", origin="tools")


async def test_a_mistake_of_an_endpoint_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*given: Any) -> None:
        raise KeyError("a mistake of ours")

    path = tmp_path / "journal"
    await write_journal(path, admission(0, json.dumps(body_of(PATHS[0]))))
    monkeypatch.setattr("llamaclust.cluster.front.dialects.dialect.parse_body", broken)
    async with served(path) as server:
        reply = await server.http.get(f"/v1/streams/{0:024x}")
    assert "could not be restored" in reply.text and "a mistake of ours" in caplog.text


async def test_restored_requests_that_are_refused_fail_alone(tmp_path: Path) -> None:
    path, good = tmp_path / "journal", json.dumps(body_of(PATHS[0]))
    bad = (admission(0, "no JSON"), admission(1, good, endpoint="/gone"), admission(2, '{"prompt": "x", "n": -1}'))
    await write_journal(path, *bad, admission(3, good))
    async with served(path) as server:
        assert (await stream(server.http, "GET", "/v1/streams/key 3"))[-1][1] == "[DONE]"
        for number in range(3):
            ((_, error),) = await stream(server.http, "GET", f"/v1/streams/key {number}")
            assert isinstance(error, dict) and "error" in error


async def test_a_restored_chat_is_rendered_with_the_time_of_its_admission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the time, so that templates with a date give the same prompt after midnight or a change of the clock."""
    seen, chat = list[float](), TextService.chat

    async def seeing(service: TextService, request: ChatRequest) -> CompletionRequest:
        seen.append(request.created)
        return await chat(service, request)

    monkeypatch.setattr(TextService, "chat", seeing)
    journalled = admission(0, json.dumps(body_of(PATHS[1])), endpoint=PATHS[1])
    await write_journal(tmp_path / "journal", journalled)
    async with served(tmp_path / "journal") as server:
        await stream(server.http, "GET", "/v1/streams/key 0")
    assert seen == [journalled.created]


async def test_a_restored_request_has_the_scales_of_its_admission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, chat = list[AdapterScales](), TextService.chat

    async def seeing(service: TextService, request: ChatRequest) -> CompletionRequest:
        seen.append(request.answer.adapters)
        return await chat(service, request)

    monkeypatch.setattr(TextService, "chat", seeing)
    journalled = admission(0, json.dumps(body_of(PATHS[1])), endpoint=PATHS[1])
    scaled = replace(journalled, scales=((0, 0.5),))
    await write_journal(tmp_path / "journal", scaled)
    async with served(tmp_path / "journal") as server:
        await stream(server.http, "GET", "/v1/streams/key 0")
    assert seen == [((0, 0.5),)]


async def test_more_restored_requests_than_are_kept_do_not_stop_a_start(tmp_path: Path) -> None:
    path, body = tmp_path / "journal", json.dumps(body_of(PATHS[0]))
    await write_journal(path, *(admission(number, body) for number in range(4)))
    async with served(path, max_kept_replies=3) as server:
        codes = [(await server.http.get(f"/v1/streams/key {number}")).status_code for number in range(4)]
        assert codes == [200, 200, 200, 404]
    body += " " * (1 << 20)
    await write_journal(path, *(admission(number, body) for number in range(4)))
    async with served(path, max_kept_bytes=5 << 19) as server:
        codes = [(await server.http.get(f"/v1/streams/key {number}")).status_code for number in range(4)]
        assert codes == [200, 200, 404, 404]


async def test_restored_streams_have_only_the_limits_of_their_admission(tmp_path: Path) -> None:
    """Kept replies have limits on bytes and number. Streams without a key have none until a restart keeps them."""
    path, body = tmp_path / "journal", json.dumps(body_of(PATHS[0]))
    streams = (replace(admission(number, body + " " * 80_000), idempotency_key="") for number in range(3))
    await write_journal(path, *streams, admission(3, body))
    async with served(path, max_kept_replies=1, max_reply_bytes=20_000, max_kept_bytes=200_000) as server:
        server.pipeline.gate.clear()
        entries = server.replies.cache._entries
        assert len(entries) == 4, "streams take no room from the kept reply"
        reading = [asyncio.create_task(stream(server.http, "GET", f"/v1/streams/{n:024x}")) for n in range(3)]
        await until(lambda: sum(entry.kept.is_read for entry in entries.values()) == 3 or reading[-1].done())
        server.pipeline.gate.set()
        assert [events[-1][1] for events in await asyncio.gather(*reading)] == ["[DONE]"] * 3


async def test_restored_requests_wait_where_the_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that requests without a stream get a whole reply and that cancelled requests are not computed."""
    path, compute, computed, is_full = tmp_path / "journal", KeptReply._compute, list[KeptReply](), True

    async def refusing(self: KeptReply, reply: Reply, *, is_recorded: bool) -> None:
        if is_full:
            raise QueueFullError("the queue is full", 0.01)
        await compute(self, reply, is_recorded=is_recorded)
        computed.append(self)

    monkeypatch.setattr(KeptReply, "_compute", refusing)
    body = json.dumps(body_of(PATHS[0], stream=False))
    await write_journal(path, *(admission(number, body, is_streamed=False) for number in range(3)))
    async with served(path) as server:
        asking = [asyncio.create_task(server.http.get(f"/v1/streams/key {number}")) for number in (0, 2)]
        await until(lambda: sum(entry.kept.is_read for entry in server.replies.cache._entries.values()) == 2)
        assert not any(task.done() for task in asking)
        await server.http.delete("/v1/streams/key 0")
        await server.http.delete("/v1/streams/key 1")
        is_full = False
        refused, whole = await asyncio.gather(*asking)
        assert refused.status_code == 410 and whole.json()["choices"][0]["token_ids"]
        assert len(computed) == 1


async def test_restored_requests_wait_where_the_machine_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that a request which waits for the chat template, like on busy cores, does not block the next one."""
    path, compute, refused, is_busy = tmp_path / "journal", KeptReply._compute, list[KeptReply](), True

    async def busy(self: KeptReply, reply: Reply, *, is_recorded: bool) -> None:
        if is_busy and (not refused or self is refused[0]):
            refused.append(self)
            raise DeadlineError("the chat template was busy")
        await compute(self, reply, is_recorded=is_recorded)

    monkeypatch.setattr(KeptReply, "_compute", busy)
    monkeypatch.setattr(kept_reply, "_BUSY", Backoff(0.05, 0.05))
    monkeypatch.setattr(handlers, "_ALONE_S", 0.05)
    await write_journal(path, *(admission(number, json.dumps(body_of(PATHS[0]))) for number in range(2)))
    async with served(path) as server:
        assert (await stream(server.http, "GET", "/v1/streams/key 1"))[-1][1] == "[DONE]"
        assert refused
        is_busy = False
        assert (await stream(server.http, "GET", "/v1/streams/key 0"))[-1][1] == "[DONE]"


async def test_a_start_that_is_refused_halfway_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests a queue with room for only one of two prompts; both are submitted again and event ids stay the same."""
    submit, refusals = TextService.submit, [False, True]

    def refusing(self: TextService, *arguments: Any) -> Completion:
        if refusals and refusals.pop(0):
            raise QueueFullError("the queue is full", 0.01)
        return submit(self, *arguments)

    body = body_of(PATHS[0], prompt=["Hello", "you"], max_tokens=3)
    async with served(tmp_path / "other") as server:
        wanted = await stream(server.http, "POST", PATHS[0], json=body)
    path = tmp_path / "journal"
    await write_journal(path, admission(0, json.dumps(body)))
    monkeypatch.setattr(TextService, "submit", refusing)
    async with served(path) as server:
        events = await stream(server.http, "GET", "/v1/streams/key 0")
        assert not refusals
        assert [event_id.partition(":")[2] for event_id, _ in events] == [
            event_id.partition(":")[2] for event_id, _ in wanted
        ]


@pytest.mark.parametrize("end_s", [0.0, 0.02])
async def test_of_requests_at_once_in_one_conversation_one_is_left(
    end_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that one request remains, even if requests arrive while the previous one is being closed."""
    end = KeptReply.aclose

    async def slow(self: KeptReply) -> None:
        if end_s:
            await asyncio.sleep(end_s)
        await end(self)

    monkeypatch.setattr(KeptReply, "aclose", slow)
    headers = {"X-Conversation-Id": "chat"}
    async with served(tmp_path / "journal") as server:
        server.pipeline.gate.clear()
        post, body = server.http.post, body_of("/completion")
        asking = [asyncio.create_task(post("/completion", json=body, headers=headers)) for _ in range(6)]
        await until(lambda: sum(task.done() for task in asking) == 5)
        server.pipeline.gate.set()
        replies = await asyncio.gather(*asking)
        assert sum("was cancelled" in reply.text for reply in replies) == 5


async def test_equal_requests_at_once_in_one_conversation_get_one_reply() -> None:
    engine, body, conversation = ScriptedEngine(says("Hello")), {"prompt": "Hi"}, {"X-Conversation-Id": "chat"}
    async with client(make_app(engine)) as http:
        await http.post(PATHS[0], json=body, headers=conversation)
        asking = [http.post(PATHS[0], json=body, headers=conversation | KEY) for _ in range(3)]
        replies = await asyncio.gather(*asking)
    assert [reply.status_code for reply in replies] == [200] * 3 and len({reply.content for reply in replies}) == 1
    assert len(engine.submitted) == 2


@pytest.mark.parametrize("headers", [{}, KEY], ids=["direct", "kept"])
@pytest.mark.parametrize("tokens", [90, 64])
async def test_what_a_client_had_not_read_of_a_sent_reply_outlives_the_coordinator(
    headers: dict[str, str], tokens: int, tmp_path: Path
) -> None:
    """Checks that the reply is computed only once its client comes back, and otherwise leaves the journal."""
    path, body = tmp_path / "journal", body_of(PATHS[0], max_tokens=tokens)
    async with served(path, KilledJournal) as server:
        whole = await stream(server.http, "POST", PATHS[0], json=body, headers=headers)
        await stream(server.http, "POST", PATHS[0], json=body)
        await until(lambda: [request.is_sent for request in read_journal(path, Instant.now())] == [True, True])
    events = whole[: random.Random(SEED).randrange(1, len(whole))]
    request_id, last = events[-1][0].partition(":")[0], {"Last-Event-ID": events[-1][0]}
    before = path.read_bytes()
    async with served(path) as server:
        assert is_idle(server.engine) and server.engine.scheduler.counts.running == 0
        events += await stream(server.http, "GET", f"/v1/streams/{request_id}", headers=last)
        assert_same(events, whole)
    path.write_bytes(before)
    async with served(path, resume_s=0.2) as server:
        await until(lambda: path.stat().st_size == 0)
        await until(lambda: server.replies.cache.named("", request_id) is None)
        gone = await server.http.get(f"/v1/streams/{request_id}")
        assert gone.status_code == 404 and is_idle(server.engine)


async def test_a_restored_requests_deadline_goes_on(tmp_path: Path) -> None:
    path, body = tmp_path / "journal", json.dumps(body_of(PATHS[0], stream=False))
    near = replace(admission(0, body, is_streamed=False), limit_s=4.0)
    await write_journal(path, near, admission(1, body, is_streamed=False))
    async with served(path) as server:
        server.pipeline.gate.clear()
        reply = await server.http.get("/v1/streams/key 0")
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        server.pipeline.gate.set()
        assert (await server.http.get("/v1/streams/key 1")).status_code == 200


@pytest.mark.parametrize("has_grammar", [True, False])
async def test_a_restored_chat_has_the_grammar_of_its_first_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_grammar: bool
) -> None:
    decisions, used = [has_grammar], list[Grammar | None]()
    chat, prepare = TextService.chat, TextService.prepare

    async def deciding(service: TextService, request: ChatRequest) -> CompletionRequest:
        return replace(await chat(service, request), grammar=GRAMMAR if decisions[-1] else None)

    async def seeing(service: TextService, request: CompletionRequest, leases: RowLeases) -> GenerationRequest:
        used.append(request.grammar)
        return await prepare(service, replace(request, grammar=None), leases)

    monkeypatch.setattr(TextService, "chat", deciding)
    monkeypatch.setattr(TextService, "prepare", seeing)
    path = tmp_path / "journal"
    async with served(path, KilledJournal) as server:
        await stream(server.http, "POST", PATHS[1], json=body_of(PATHS[1]), headers=KEY)
    (left,) = read_journal(path, Instant.now())
    assert left.has_grammar == has_grammar
    decisions.append(not has_grammar)
    async with served(path) as server:
        events = await stream(server.http, "GET", "/v1/streams/one")
    if has_grammar:
        assert "was not ready in time" in str(events) and used == [GRAMMAR]
    else:
        assert events[-1][1] == "[DONE]" and used == [None, None]


@pytest.mark.parametrize(
    ("path", "fields", "is_refused"),
    [
        ("/completion", {}, False),
        ("/completion", {"timings_per_token": True}, True),
        ("/completion", {"return_progress": True}, True),
        (PATHS[0], {"stream_options": {"include_usage": True}}, False),
        (PATHS[0], {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, True),
        (PATHS[0], {"n": 2}, True),
        (PATHS[0], {"prompt": ["Hello", "you"]}, True),
        (PATHS[1], {"n": 2}, True),
        ("/completion", {"prompt": ["Hello", "you"]}, True),
        ("/v1/messages", {}, True),
    ],
)
async def test_bytes_of_a_stream_that_may_differ_are_refused_after_a_kill(
    tmp_path: Path, path: str, fields: dict[str, Any], is_refused: bool
) -> None:
    headers = {"X-Conversation-Id": "chat"}
    body = body_of(PATHS[1], ignore_eos=False) if path == "/v1/messages" else body_of(path)
    async with served(tmp_path / "journal", KilledJournal) as server:
        begun = await stream(server.http, "POST", path, json=body | fields, headers=headers, most=2)
        assert begun and (await server.http.get("/v1/stream/chat", params={"from": 1})).status_code == 200
    async with served(tmp_path / "journal") as server:
        rest = await server.http.get("/v1/stream/chat", params={"from": 30})
        whole = await server.http.get("/v1/stream/chat", params={"from": 0})
    assert whole.status_code == 200
    if is_refused:
        assert rest.status_code == 409 and rest.json()["error"]["code"] == "stream_computed_again"
    else:
        assert rest.content == whole.content[30:]
