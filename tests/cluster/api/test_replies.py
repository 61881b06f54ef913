"""Replies whose clients are cut off, and replies that a coordinator did not complete: no event is lost or doubled."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.api.openai.reply import OpenAiReply
from llamaclust.cluster.api.replies.kept import KeptReply
from llamaclust.cluster.api.replies.replies import Durability, Replies
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Admission, Journal, read_journal
from llamaclust.cluster.text import choice as choice_text
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream
from llamaclust.core.errors import QueueFullError
from support.clusters.fakes import FakePipeline
from support.clusters.served import SETTINGS, make_app, real_engine, serving, until
from support.seed import SEED

PATHS = ("/v1/completions", "/v1/chat/completions", "/completion")
KEY = {"Idempotency-Key": "one"}
SERVED = "digest"


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else {"prompt": "Hello, you there"}
    length = {"n_predict": 90} if path == "/completion" else {"max_tokens": 90, "return_token_ids": True}
    return prompt | length | {"ignore_eos": True, "stream": True, "seed": 7} | fields


@dataclass
class Served:
    engine: Engine
    pipeline: FakePipeline
    http: httpx.AsyncClient
    replies: Replies


class KilledJournal(Journal):
    """As a kill leaves it: no request has ended."""

    def end(self, request_id: str) -> None:
        pass

    async def aclose(self) -> None:
        self.seal()
        await super().aclose()


@asynccontextmanager
async def served(
    journal: Path, kind: type[Journal] = Journal, prefill_chunk: int | None = None, **more: Any
) -> AsyncIterator[Served]:
    """A server that begins with what the journal holds."""
    settings = {"first_chunk_s": 0.02} | more
    resume_s = ApiSettings(**settings).resume_s
    async with (
        real_engine(replace(SETTINGS, prefill_chunk=prefill_chunk)) as (engine, pipeline),
        aclosing(kind(journal, ControlRecord(), resume_s)) as opened,
        aclosing(Replies(ApiSettings(**settings), Durability(opened, SERVED, 60.0))) as replies,
    ):
        app = make_app(engine, replies=replies, **settings)
        await replies.restore(read_journal(journal, 0.0, SERVED))
        async with (
            serving(app) as address,
            httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as http,
        ):
            yield Served(engine, pipeline, http, replies)


Event = tuple[str, dict[str, Any] | str]


class EventLines:
    """Events with their ids, of whole lines as they come."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._id = ""

    def take(self, line: str) -> None:
        name, _, value = line.partition(": ")
        if name == "id":
            self._id = value
        elif name == "data":
            self.events.append((self._id, value if value == "[DONE]" else json.loads(value)))


def shown(events: list[Event]) -> dict[int | str, list[Any]]:
    """What the events of each choice say, in their order, without what clocks say."""
    choices: dict[int | str, list[Any]] = {}
    for _, data in events:
        if isinstance(data, str):
            choices.setdefault("end", []).append(data)
            continue
        for choice in data.get("choices") or [data]:
            if "index" in choice:
                kept = {name: value for name, value in choice.items() if name not in ("timings", "tokens_cached")}
                choices.setdefault(choice["index"], []).append(kept)
            else:
                choices.setdefault("usage", []).append(choice["usage"]["completion_tokens"])
    return choices


def assert_same(events: list[Event], whole: list[Event]) -> None:
    """Without pytest's comparison of long lists, which takes minutes."""
    found, wanted = shown(events), shown(whole)
    assert sorted(map(str, found)) == sorted(map(str, wanted))
    for slot, parts in wanted.items():
        numbers = [number for number, part in enumerate(parts) if found[slot][number : number + 1] != [part]]
        assert len(found[slot]) == len(parts) and not numbers, (slot, len(found[slot]), len(parts), numbers[:5])


async def read(reply: httpx.Response, most: int | None = None) -> list[Event]:
    lines = EventLines()
    async for line in reply.aiter_lines():
        lines.take(line)
        if most is not None and len(lines.events) == most:
            break
    return lines.events


async def stream(http: httpx.AsyncClient, method: str, path: str, **more: Any) -> list[Event]:
    most = more.pop("most", None)
    async with http.stream(method, path, **more) as reply:
        assert reply.status_code == 200, await reply.aread()
        return await read(reply, most)


def is_idle(engine: Engine) -> bool:
    counts = engine.scheduler.counts
    return counts.running == counts.waiting == counts.kv_blocks_held == 0


@pytest.mark.parametrize("again", ["GET", "POST"])
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
        else:
            events += await stream(server.http, "POST", path, json=body, headers=KEY | last)
        assert_same(events, whole)
        await until(lambda: is_idle(server.engine))


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("path", PATHS)
async def test_a_coordinator_that_was_killed_answers_the_same_after_its_restart(
    path: str, is_recorded: bool, tmp_path: Path
) -> None:
    """The journal as it was at the moment of the kill; answers with alternatives are computed from the prompt on."""
    top = {"/completion": {"n_probs": 2}, "/v1/completions": {"logprobs": 2}}.get(
        path, {"logprobs": True, "top_logprobs": 2}
    )
    body = body_of(path, **({} if is_recorded else top)) | ({} if path == "/completion" else {"n": 2})
    async with served(tmp_path / "other") as server:
        whole = await stream(server.http, "POST", path, json=body)
    async with served(tmp_path / "journal", KilledJournal) as server:
        events = await stream(server.http, "POST", path, json=body, most=random.Random(SEED).randrange(1, len(whole)))
    opened = read_journal(tmp_path / "journal", 0.0, SERVED)
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
        await until(lambda: [request.is_sent for request in read_journal(tmp_path / "journal", 0.0, SERVED)] == [True])
    assert (tmp_path / "journal").stat().st_size == 0


async def test_events_of_a_scored_prompt_do_not_depend_on_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator computes the prompt in other chunks, beside other requests; its events are the same."""
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
        with pytest.raises(httpx.ReadTimeout):
            await server.http.post(PATHS[0], json=body, headers=KEY, timeout=0.2)
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
        await until(lambda: is_idle(server.engine))  # it waited for its client in vain
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
        assert (await server.http.get("/v1/stream/chat 5")).content == newer.content
        bad = await server.http.get("/v1/stream/chat 5", params={"from": "x"})
        assert bad.status_code == 400


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
        assert reply.status_code == 503 and "was cancelled" in reply.json()["error"]["message"]
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
        assert [request.is_sent for request in read_journal(path, 0.0, SERVED)] == [False]
        assert await stream(server.http, "GET", "/v1/streams/one")
        await until(lambda: [request.is_sent for request in read_journal(path, 0.0, SERVED)] == [True])
    assert path.stat().st_size == 0


@pytest.mark.parametrize("headers", [{}, KEY], ids=["direct", "kept"])
@pytest.mark.parametrize("tokens", [90, 64])
async def test_what_a_client_had_not_read_of_a_sent_reply_outlives_the_coordinator(
    headers: dict[str, str], tokens: int, tmp_path: Path
) -> None:
    """It is computed when its client comes back, and not before; without a client the journal forgets it."""
    path, body = tmp_path / "journal", body_of(PATHS[0], max_tokens=tokens)
    async with served(path, KilledJournal) as server:
        whole = await stream(server.http, "POST", PATHS[0], json=body, headers=headers)
        await stream(server.http, "POST", PATHS[0], json=body)
        await until(lambda: [request.is_sent for request in read_journal(path, 0.0, SERVED)] == [True, True])
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
        await asyncio.sleep(0.1)  # the reply's own timer
        gone = await server.http.get(f"/v1/streams/{request_id}")
        assert gone.status_code == 404 and is_idle(server.engine)


async def write_journal(path: Path, *admissions: Admission) -> None:
    async with aclosing(Journal(path, ControlRecord(), 60.0)) as journal:
        for admission in admissions:
            await journal.admit(admission)


def admission(number: int, body: str, *, endpoint: str = PATHS[0], is_streamed: bool = True) -> Admission:
    return Admission(
        id=f"{number:024x}",
        endpoint=endpoint,
        body=body,
        seed=7,
        created=1,
        deadline=2e9,
        served=SERVED,
        idempotency_key=f"key {number}",
        is_streamed=is_streamed,
    )


async def test_restored_requests_that_are_refused_fail_alone(tmp_path: Path) -> None:
    path, good = tmp_path / "journal", json.dumps(body_of(PATHS[0]))
    bad = (admission(0, "no JSON"), admission(1, good, endpoint="/gone"), admission(2, '{"prompt": "x", "n": -1}'))
    await write_journal(path, *bad, admission(3, good))
    async with served(path) as server:
        assert (await stream(server.http, "GET", "/v1/streams/key 3"))[-1][1] == "[DONE]"
        for number in range(3):
            ((_, error),) = await stream(server.http, "GET", f"/v1/streams/key {number}")
            assert isinstance(error, dict) and "error" in error


async def test_more_restored_requests_than_are_kept_do_not_stop_a_start(tmp_path: Path) -> None:
    path, body = tmp_path / "journal", json.dumps(body_of(PATHS[0]))
    await write_journal(path, *(admission(number, body) for number in range(4)))
    async with served(path, max_kept_replies=3) as server:
        codes = [(await server.http.get(f"/v1/streams/key {number}")).status_code for number in range(4)]
        assert codes == [200, 200, 200, 404]
    await write_journal(path, *(admission(number, body) for number in range(4)))
    async with served(path, max_kept_bytes=len(body) + 1) as server:
        codes = [(await server.http.get(f"/v1/streams/key {number}")).status_code for number in range(4)]
        assert codes == [200, 200, 404, 404]


async def test_restored_requests_wait_where_the_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not streamed is answered as a whole; one that is cancelled meanwhile is not computed."""
    path, computed, is_full = tmp_path / "journal", [], True
    start = OpenAiReply.start

    async def refusing(self: OpenAiReply) -> None:
        if is_full:
            raise QueueFullError("the queue is full", 0.01)
        await start(self)
        computed.append(self)

    monkeypatch.setattr(OpenAiReply, "start", refusing)
    body = json.dumps(body_of(PATHS[0], stream=False))
    await write_journal(path, *(admission(number, body, is_streamed=False) for number in range(3)))
    async with served(path) as server:
        asking = [asyncio.create_task(server.http.get(f"/v1/streams/key {number}")) for number in (0, 2)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in asking)
        await server.http.delete("/v1/streams/key 0")
        await server.http.delete("/v1/streams/key 1")
        is_full = False
        refused, whole = await asyncio.gather(*asking)
        assert refused.status_code == 503 and whole.json()["choices"][0]["token_ids"]
        assert len(computed) == 1


async def test_a_start_that_is_refused_halfway_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue has room for the first of two prompts only: both are submitted again, and events have the same ids."""
    submit, refusals = TextService.submit, [False, True]

    def refusing(self: TextService, *arguments: Any) -> CompletionStream:
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


async def test_of_requests_at_once_in_one_conversation_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they come while the one before is being ended."""
    end = KeptReply.aclose

    async def slow(self: KeptReply) -> None:
        await asyncio.sleep(0.02)
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
