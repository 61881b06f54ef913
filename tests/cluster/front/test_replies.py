"""Checks that no event is lost or repeated after a lost connection or a coordinator's end."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.text import completion as choice_text
from llamaclust.cluster.state.journal_records import Instant, read_journal
from llamaclust.core.errors import (
    ClusterStoppingError,
    DeadlineError,
    LlamaclustError,
    RequestFailedError,
    WorkerError,
)
from support.clusters.resumable import (
    KEY,
    PATHS,
    READS_IDS,
    Event,
    KilledJournal,
    assert_same,
    body_of,
    is_idle,
    leave_early,
    served,
    stream,
)
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, until
from support.seed import SEED


@pytest.mark.parametrize("again", ["GET", "after", "POST"])
@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_was_cut_off_gets_the_rest(path: str, again: str, tmp_path: Path) -> None:
    drawn = random.Random(SEED)
    body = body_of(path) if path == "/completion" else body_of(path, n=3, stream_options={"include_usage": True})
    async with served(tmp_path / "journal") as server:
        whole = await stream(server.http, "POST", path, json=body)
        events: list[Event] = []
        for cut in sorted(drawn.sample(range(1, len(whole)), 3)):
            after = {"Last-Event-ID": events[-1][0]} if events else {}
            events += await stream(server.http, "POST", path, json=body, headers=KEY | after, most=cut - len(events))
        assert 0 < len(events) < len(whole)
        last = {"Last-Event-ID": events[-1][0]}
        if again == "GET":
            request_id = events[-1][0].partition(":")[0]
            events += await stream(server.http, "GET", f"/v1/streams/{request_id}", headers=last)
        elif again == "after":  # the whole id or the part after its colon
            request_id, _, position = events[-1][0].partition(":")
            given = drawn.choice([events[-1][0], position])
            events += await stream(server.http, "GET", f"/v1/streams/{request_id}?after={given}")
        else:
            events += await stream(server.http, "POST", path, json=body, headers=KEY | last)
        assert_same(events, whole)
        await until(lambda: is_idle(server.engine))


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("path", PATHS)
async def test_a_coordinator_that_was_killed_answers_the_same_after_its_restart(
    path: str, is_recorded: bool, tmp_path: Path
) -> None:
    """Restarts with the journal as of the kill; answers with alternatives are computed again from the prompt."""
    top = {"/completion": {"n_probs": 2}, "/v1/completions": {"logprobs": 2}}.get(
        path, {"logprobs": True, "top_logprobs": 2}
    )
    body = body_of(path, **({} if is_recorded else top)) | ({} if path == "/completion" else {"n": 2})
    async with served(tmp_path / "other") as server:
        whole = await stream(server.http, "POST", path, json=body)
    async with served(tmp_path / "journal", KilledJournal) as server:
        events = await stream(server.http, "POST", path, json=body, most=random.Random(SEED).randrange(1, len(whole)))
    opened = read_journal(tmp_path / "journal", Instant.now())
    assert len(opened) == 1 and not (opened[0].answered and not is_recorded)
    request_id = events[-1][0].partition(":")[0]
    async with served(tmp_path / "journal") as server:
        last = {"Last-Event-ID": events[-1][0]}
        events += await stream(server.http, "GET", f"/v1/streams/{request_id}", headers=last)
        assert_same(events, whole)
        assert {event[1]["id"] for event in events if "id" in event[1] and isinstance(event[1], dict)} <= {
            f"cmpl-{request_id}",
            f"chatcmpl-{request_id}",
        }
        await until(lambda: is_idle(server.engine))
        await until(
            lambda: [request.is_sent for request in read_journal(tmp_path / "journal", Instant.now())] == [True]
        )
    assert (tmp_path / "journal").stat().st_size == 0


async def lines(http: httpx.AsyncClient, method: str, path: str, most: int | None = None, **more: Any) -> list[Any]:
    """Returns at most `most` lines of a stream of JSON lines."""
    found: list[Any] = []
    async with http.stream(method, path, **more) as reply:
        assert reply.headers["content-type"] == "application/x-ndjson"
        async for line in reply.aiter_lines():
            found.append(json.loads(line))
            if len(found) == most:
                break
    return found


async def test_lines_of_ollama_outlive_the_coordinator(tmp_path: Path) -> None:
    """Checks that a client gets the rest by its key and its number of lines; without a key it cannot."""
    path, messages = tmp_path / "journal", [{"role": "user", "content": "Hello"}]
    body = {"model": MODEL, "messages": messages, "options": {"num_predict": 40, "seed": 7}}
    most = random.Random(SEED).randrange(1, 40)
    async with served(path, KilledJournal) as server:
        whole = await lines(server.http, "POST", "/api/chat", json=body)
        read = await lines(server.http, "POST", "/api/chat", most, json=body, headers=KEY)
    assert [request.endpoint for request in read_journal(path, Instant.now())] == ["/api/chat"]
    async with served(path) as server:
        read += await lines(server.http, "GET", f"/v1/streams/one?after={len(read)}")
        await until(lambda: is_idle(server.engine))
    assert [line["message"] for line in read] == [line["message"] for line in whole]
    assert (read[-1]["eval_count"], read[-1]["done"], len({line["created_at"] for line in read})) == (40, True, 1)


async def test_events_of_a_scored_prompt_do_not_depend_on_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts a coordinator, which sends equal events although the prompt's chunks and the other requests differ."""
    monkeypatch.setattr(choice_text, "SCORED_TOKENS", 16)
    body = body_of(PATHS[0], prompt="one two three four five " * 5, echo=True, logprobs=1, max_tokens=3)
    async with served(tmp_path / "other", prefill_chunk=50) as server:
        whole = await stream(server.http, "POST", PATHS[0], json=body)
    for most in (1, 4, len(whole) - 2):
        journal = tmp_path / f"journal{most}"
        async with served(journal, KilledJournal, prefill_chunk=11) as server:
            events = await stream(server.http, "POST", PATHS[0], json=body, most=most)
        request_id = events[-1][0].partition(":")[0]
        async with served(journal, prefill_chunk=23) as server:
            load = [stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0], max_tokens=20)) for _ in range(3)]
            again = stream(server.http, "GET", f"/v1/streams/{request_id}", headers={"Last-Event-ID": events[-1][0]})
            rest, *_ = await asyncio.gather(again, *load)
            assert_same(events + rest, whole)


async def test_a_reply_that_is_not_streamed_is_kept_too(tmp_path: Path) -> None:
    body = body_of(PATHS[0], stream=False)
    async with served(tmp_path / "journal") as server:
        server.pipeline.gate.clear()
        await leave_early(server, body)
        server.pipeline.gate.set()
        first = await server.http.post(PATHS[0], json=body, headers=KEY)
        again = await server.http.get("/v1/streams/one")
        assert first.status_code == 200 and first.content == again.content
        other = await server.http.post(PATHS[0], json=body | {"seed": 8}, headers=KEY)
        assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"


async def test_replies_end_with_their_clients_unless_they_are_to_be_kept(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", resume_s=0.1) as server:
        await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), most=3)
        await until(lambda: is_idle(server.engine))
        server.pipeline.gate.clear()
        reading = asyncio.create_task(stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY))
        await until(lambda: not is_idle(server.engine))
        reading.cancel()
        await asyncio.wait([reading])
        await until(lambda: is_idle(server.engine))  # no client came within `resume_s`
        gone = await server.http.get("/v1/streams/one")
        assert gone.status_code == 404 and "timeouts.resume" in gone.json()["error"]["message"]
        lost = await server.http.post(PATHS[0], json=body_of(PATHS[0]), headers=KEY | {"Last-Event-ID": "x:3"})
        assert lost.status_code == 404
        server.pipeline.gate.set()


async def test_a_reply_can_be_stopped(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        server.pipeline.gate.clear()
        reading = asyncio.create_task(stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY))
        await until(lambda: not is_idle(server.engine))
        assert [(await server.http.delete("/v1/streams/one")).status_code for _ in range(2)] == [204, 204]
        await until(lambda: is_idle(server.engine))
        reading.cancel()
        await asyncio.wait([reading])
        server.pipeline.gate.set()


async def test_llamacpps_form_counts_bytes(tmp_path: Path) -> None:
    headers = {"X-Conversation-Id": "chat 5"}
    async with served(tmp_path / "journal") as server:
        reply = await server.http.post("/completion", json=body_of("/completion"), headers=headers)
        for start in (0, 1, 100, len(reply.content)):
            rest = await server.http.get("/v1/stream/chat 5", params={"from": start})
            assert rest.content == reply.content[start:]
        newer = await server.http.post("/completion", json=body_of("/completion", seed=9), headers=headers)
        for path in ("/v1/stream/chat 5", "/v1/stream?conv_id=chat%205"):
            assert (await server.http.get(path)).content == newer.content
        bad = await server.http.get("/v1/stream/chat 5", params={"from": "x"})
        assert bad.status_code == (await server.http.get("/v1/stream")).status_code == 400
        assert (await server.http.delete("/v1/stream?conv_id=chat%205")).status_code == 204
        assert (await server.http.get("/v1/stream/chat 5")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/api/chat"])
async def test_llamacpps_form_returns_a_reply_that_is_not_streamed_as_a_whole(path: str, tmp_path: Path) -> None:
    said = {"input": "Hello"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "Hello"}]}
    body = {"model": MODEL, "stream": False, **said}
    async with served(tmp_path / "journal") as server:
        whole = await server.http.post(path, json=body, headers=KEY)
        assert whole.status_code == 200 and whole.json()
        for query in ("", "?from=0"):
            again = await server.http.get(f"/v1/stream/one{query}")
            assert (again.content, again.headers["content-type"]) == (whole.content, whole.headers["content-type"])
        refused = await server.http.get("/v1/stream/one?from=1")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_streamed")


async def test_a_key_is_the_same_however_its_header_is_written(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", api_keys=("first-key",)) as server:
        first = {"Authorization": "Bearer first-key"}
        await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY | first)
        for shown in ("bearer first-key", "BEARER   first-key"):
            assert (await server.http.get("/v1/streams/one", headers={"Authorization": shown})).status_code == 200


async def test_where_no_key_is_needed_any_header_reads_a_reply(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY | {"Authorization": "Bearer x"})
        assert (await server.http.get("/v1/streams/one")).status_code == 200


async def test_another_key_cannot_read_a_reply(tmp_path: Path) -> None:
    keys = ("first-key", "second-key")
    async with served(tmp_path / "journal", api_keys=keys) as server:
        first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
        events = await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY | first)
        request_id = events[0][0].partition(":")[0]
        for name in (request_id, "one"):
            assert (await server.http.get(f"/v1/streams/{name}", headers=first)).status_code == 200
            assert (await server.http.get(f"/v1/streams/{name}", headers=second)).status_code == 404


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Last-Event-ID": "x:-1"}, 400),
        ({"Last-Event-ID": "1-" * 200 + "1"}, 400),
        ({"Idempotency-Key": "x" * 300}, 400),
    ],
)
async def test_headers_that_make_no_sense_are_refused(headers: dict[str, str], code: int, tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY)
        reply = await server.http.post(PATHS[0], json=body_of(PATHS[0]), headers=KEY | headers)
        assert reply.status_code == code


@pytest.mark.parametrize("again", ["GET", "after", "POST"])
async def test_an_event_of_another_request_is_refused(again: str, tmp_path: Path) -> None:
    """Checks that an event id of another, possibly dropped reply is refused, since this reply would not continue it."""
    body, other = body_of(PATHS[0]), "3f2a0b1c2d3e4f5061728394:17"
    async with served(tmp_path / "journal") as server:
        await stream(server.http, "POST", PATHS[0], json=body, headers=KEY)
        if again == "POST":
            reply = await server.http.post(PATHS[0], json=body, headers=KEY | {"Last-Event-ID": other})
        elif again == "GET":
            reply = await server.http.get("/v1/streams/one", headers={"Last-Event-ID": other})
        else:
            reply = await server.http.get("/v1/streams/one", params={"after": other})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "bad_event_id")
        assert error["message"].startswith(
            f"{'after' if again == 'after' else 'Last-Event-ID'}: '{other}' is an event of"
        )


async def test_kept_replies_are_bounded(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", max_kept_replies=2, max_reply_bytes=1000) as server:
        server.pipeline.gate.clear()
        posts = [
            asyncio.create_task(
                server.http.post(PATHS[0], json=body_of(PATHS[0]), headers={"Idempotency-Key": str(number)})
            )
            for number in range(2)
        ]
        await until(lambda: server.engine.scheduler.counts.running == 2)
        refused = await server.http.post(PATHS[0], json=body_of(PATHS[0]), headers=KEY)
        assert refused.status_code == 503 and "2 kept replies" in refused.json()["error"]["message"]
        server.pipeline.gate.set()
        for reply in await asyncio.gather(*posts):
            assert '"code":"reply_too_large"' in reply.text
        assert (await server.http.post(PATHS[0], json=body_of(PATHS[0]), headers=KEY)).status_code == 200


async def test_a_reply_that_is_not_streamed_is_stopped_with_an_error(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        server.pipeline.gate.clear()
        body = body_of(PATHS[0], stream=False)
        asking = asyncio.create_task(server.http.post(PATHS[0], json=body, headers=KEY))
        await until(lambda: not is_idle(server.engine))
        await server.http.delete("/v1/streams/one")
        reply = await asking
        assert (reply.status_code, reply.json()["error"]["code"]) == (410, "request_cancelled")
        server.pipeline.gate.set()


async def test_a_name_may_have_a_slash(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        key = {"Idempotency-Key": "a/b"}
        whole = await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=key)
        assert await stream(server.http, "GET", "/v1/streams/a/b") == whole


async def test_a_reply_counts_as_sent_once_a_connection_took_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with served(path) as server:
        server.pipeline.gate.clear()
        async with server.http.stream("POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY):
            pass
        server.pipeline.gate.set()
        await until(lambda: is_idle(server.engine))
        assert [request.is_sent for request in read_journal(path, Instant.now())] == [False]
        assert await stream(server.http, "GET", "/v1/streams/one")
        await until(lambda: [request.is_sent for request in read_journal(path, Instant.now())] == [True])
    assert path.stat().st_size == 0


async def test_a_whole_reply_counts_as_sent_once_a_connection_took_it(tmp_path: Path) -> None:
    """Checks that a later coordinator computes the reply again only if its client comes back."""
    path, body = tmp_path / "journal", body_of(PATHS[0], stream=False)
    async with served(path, KilledJournal) as server:
        server.pipeline.gate.clear()
        await leave_early(server, body)
        server.pipeline.gate.set()
        await until(lambda: is_idle(server.engine))
        assert [request.is_sent for request in read_journal(path, Instant.now())] == [False]
        first = await server.http.get("/v1/streams/one")
        await until(lambda: [request.is_sent for request in read_journal(path, Instant.now())] == [True])
    async with served(path) as server:
        assert is_idle(server.engine) and server.engine.scheduler.counts.running == 0
        again = await server.http.get("/v1/streams/one")
        assert again.json()["choices"][0]["token_ids"] == first.json()["choices"][0]["token_ids"]


@pytest.mark.parametrize(("headers", "has_ids"), [({"Accept": "*/*"}, False), (READS_IDS, True), (KEY, True)])
async def test_only_clients_that_read_ids_of_events_get_them(
    headers: dict[str, str], has_ids: bool, tmp_path: Path
) -> None:
    """Checks for clients that expect only `data:` lines with JSON."""
    async with served(tmp_path / "journal") as server:
        reply = await server.http.post(PATHS[0], json=body_of(PATHS[0]), headers={"Accept": "*/*"} | headers)
        events = [part for part in reply.text.split("\n\n") if part and not part.startswith(":")]
        assert all(part.startswith("id: ") is has_ids for part in events) and len(events) > 3


async def test_a_conversation_and_a_key_may_have_the_same_name(tmp_path: Path) -> None:
    """Checks that a conversation and an idempotency key of the same name are independent."""
    async with served(tmp_path / "journal") as server:
        for seed, headers in enumerate((KEY, {"X-Conversation-Id": "one"}, KEY)):
            body = body_of("/completion", seed=seed % 2)
            reply = await server.http.post("/completion", json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            assert "id: " in reply.text
            if not seed:
                first = reply.content
        assert reply.content == first  # a kept reply


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat", "/completion", "/v1/chat/completions"])
async def test_an_error_has_the_form_of_the_api_that_began_the_reply(path: str, is_streamed: bool) -> None:
    engine = ScriptedEngine(says("Hello there"), failure=WorkerError("a worker is lost"), failure_after=3)
    said = {"prompt": "a"} if path == "/completion" else {"messages": [{"role": "user", "content": "a"}]}
    body = {"model": MODEL, "stream": is_streamed, **said}
    async with client(make_app(engine)) as http:
        first = await http.post(path, json=body, headers=KEY)
        again = await http.get("/v1/streams/one")
    assert "a worker is lost" in first.text and again.status_code == first.status_code
    assert again.text == first.text


@pytest.mark.parametrize(
    ("failure", "is_anew"),
    [
        (WorkerError("a worker is lost"), True),
        (DeadlineError("it took too long"), True),
        (RequestFailedError("it broke the pipeline"), False),
        (ClusterStoppingError("the next coordinator continues"), False),
    ],
)
async def test_another_attempt_after_a_failure_that_passes_begins_anew(failure: LlamaclustError, is_anew: bool) -> None:
    engine, body = ScriptedEngine(says("Hello"), failure=failure, failure_after=1), body_of(PATHS[0])
    async with client(make_app(engine)) as http:
        failed = await http.post(PATHS[0], json=body, headers=KEY)
        engine.failure = None
        rest = await http.post(PATHS[0], json=body, headers=KEY | {"Last-Event-ID": "1"})
        again, last = [await http.post(PATHS[0], json=body, headers=KEY) for _ in range(2)]
    assert str(failure) in failed.text and failed.text.endswith(rest.text) and len(rest.text) < len(failed.text)
    assert ("[DONE]" in again.text) is is_anew and (again.text == failed.text) is not is_anew
    assert last.text == again.text and len(engine.submitted) == 1 + is_anew
