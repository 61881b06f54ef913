"""Checks that readers of kept replies that end early get the cause and that nothing continues to run."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from llamaclust.cluster.front.dialects.openai.view import OpenAiView
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.sse import StreamFormat
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import Event, Framing, Reply, View
from llamaclust.cluster.front.replies.reply_cache import ReplyCache
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem
from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.sharing import ReplyBudget
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext, read_journal
from llamaclust.core.errors import ClusterStoppingError, DeadlineError, LlamaclustError, RequestCancelledError
from llamaclust.core.sampler.results import RowResult, TopLogprobs
from support.clusters.resumable import KEY, PATHS, body_of, is_idle, served, stream
from support.clusters.served import until

CONTEXT = RequestContext(id="a", seed=1, created=1, endpoint=PATHS[0])


class PlainView(View):
    """A view that renders texts unchanged."""

    def frames(self, prompt: int, item: LogItem) -> list[Event]:
        return [Event(0, item.text.encode())] if isinstance(item, TextChunk) else []

    def whole(self, parts: Sequence[Sequence[TextChunk]]) -> Any:
        return ["".join(chunk.text for chunk in chunks) for chunks in parts]


class Endless:
    """A service whose single completion is submitted at once and has no text."""

    def __init__(self, view: Callable[[AnswerLog], View] = lambda _: PlainView()) -> None:
        service: Any = self
        self.reply = Reply(service=service, requests=_one, view=view, is_streamed=True)
        self.budget = ReplyBudget()
        self.settings = TextSettings("a", 64)
        self.submitted = self.closed = 0

    async def prepare(self, request: CompletionRequest, leases: RowLeases) -> GenerationRequest:
        return GenerationRequest("a", (), 1)

    async def choices(self, request: CompletionRequest, ready: GenerationRequest) -> list[GenerationRequest]:
        return [ready]

    def submit(self, request: CompletionRequest, choices: Sequence[Any], log: AnswerLog, prompt: int) -> Self:
        self.submitted += 1
        return self

    async def aclose(self) -> None:
        self.closed += 1


async def _one() -> list[CompletionRequest]:
    return [CompletionRequest("a")]


def kept_by(cache: ReplyCache, *, is_streamed: bool = True) -> KeptReply:
    return KeptReply(replace(CONTEXT, is_streamed=is_streamed), cache)


async def read_all(kept: KeptReply) -> bytes:
    framing = Framing(StreamFormat.LINES, "a", 20.0, with_ids=False)
    return b"".join([part async for part in kept.stream(framing)])


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_reply_is_closed_at_any_moment_after_its_begin(steps: int) -> None:
    """Checks that a reply can be closed even before the first step of its task."""
    kept = kept_by(ReplyCache(ApiSettings()))
    reply = Endless()
    reading = asyncio.create_task(read_all(kept))
    await asyncio.sleep(0)
    await kept.begin(reply.reply)
    for _ in range(steps):
        await asyncio.sleep(0)
    await kept.aclose()
    assert reply.closed
    async with asyncio.timeout(60):
        with pytest.raises(RequestCancelledError):
            await reading


async def test_readers_learn_that_the_coordinator_ends() -> None:
    """Checks that readers of running and of restored replies get the error and can retry at the next coordinator."""
    cache = ReplyCache(ApiSettings())
    replies = [kept_in(cache, "a"), kept_by(cache)]
    reading = asyncio.create_task(read_all(replies[0]))
    replies[1].end(ClusterStoppingError("the cluster is stopping"))
    cache.stop()
    await cache.aclose()
    async with asyncio.timeout(60):
        with pytest.raises(ClusterStoppingError):
            await reading
        with pytest.raises(ClusterStoppingError):
            await replies[1].begin(Endless().reply)


async def test_a_reply_that_was_closed_does_not_begin() -> None:
    kept = kept_by(ReplyCache(ApiSettings()))
    await kept.aclose()
    reply = Endless()
    with pytest.raises(RequestCancelledError):
        await kept.begin(reply.reply)
    assert not reply.submitted


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_second_connection_gets_nothing_before_the_admission_is_on_disk(
    is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk, asked, admit = asyncio.Event(), list[str](), Journal.admit

    def slow(self: Journal, admission: RequestContext) -> asyncio.Task[None]:
        async def written() -> None:
            await on_disk.wait()
            await admit(self, admission)

        asked.append(admission.id)
        return asyncio.create_task(written())

    monkeypatch.setattr(Journal, "admit", slow)
    async with served(tmp_path / "journal") as server:
        body = body_of(PATHS[0], stream=is_streamed)
        first = asyncio.create_task(server.http.post(PATHS[0], json=body, headers=KEY))
        await until(lambda: bool(asked))
        second = asyncio.create_task(server.http.post(PATHS[0], json=body, headers=KEY))
        (kept,) = [entry.kept for entry in server.replies.cache._entries.values()]
        await until(lambda: kept.is_running and kept.is_read)  # the second request is reading
        assert kept.is_running and kept.log.entry(0) is None and not (first.done() or second.done())
        on_disk.set()
        assert (await first).content == (await second).content and len(asked) == 1


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_mistake_in_a_kept_reply_is_logged_and_named(
    is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistaken(*arguments: Any, **named: Any) -> Any:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(OpenAiView, "_reply", mistaken)
    async with served(tmp_path / "journal") as server:
        body = body_of(PATHS[0], stream=is_streamed)
        if is_streamed:
            ((_, data),) = await stream(server.http, "POST", PATHS[0], json=body, headers=KEY)
            assert isinstance(data, dict)
        else:
            reply = await server.http.post(PATHS[0], json=body, headers=KEY)
            data = reply.json()
            assert reply.status_code == 500
        assert data["error"]["code"] == "internal_error" and "log says more" in data["error"]["message"]
        assert "TypeError: a mistake of ours" in caplog.text
        await until(lambda: is_idle(server.engine))
        left = partial(read_journal, tmp_path / "journal", Instant.now())
        await until(lambda: [request.is_sent for request in left()] == [True])


@pytest.mark.parametrize("end", ["timeout", "failure", "close", "stop"])
async def test_a_reply_that_ends_before_its_log_has_the_cause(end: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = kept_by(ReplyCache(ApiSettings()), is_streamed=False)
    computing = Endless()
    await kept.begin(computing.reply, until_s=asyncio.get_running_loop().time() + 0.01 if end == "timeout" else None)
    reading = asyncio.create_task(kept.whole())
    if end == "failure":
        kept.fail(LlamaclustError("a cause"))
    if end == "close":
        await kept.aclose()
    if end == "stop":
        kept.end(ClusterStoppingError("the cluster is stopping"))
    causes = {"timeout": DeadlineError, "failure": LlamaclustError, "stop": ClusterStoppingError}
    async with asyncio.timeout(60):
        with pytest.raises(causes.get(end, RequestCancelledError)):
            await reading
        await until(lambda: computing.closed > 0)
    assert not caplog.records
    await kept.aclose()


def kept_in(cache: ReplyCache, name: str, client: str = "", body: bytes = b"") -> KeptReply:
    context = RequestContext(id=name, seed=1, created=1, client=client, endpoint=PATHS[0], is_background=True)
    kept = KeptReply(context, cache)
    cache.add(kept, body)
    return kept


class Long(Endless):
    """A completion that appends many chunks of 1,256 bytes each and does not end."""

    def __init__(self, chunks: int, top_logprobs: int = 0) -> None:
        super().__init__()
        top = TopLogprobs.of([(token, -1.5) for token in range(top_logprobs)])
        self.chunk = TextChunk(text="x" * 656, rows=(RowResult(5, -1.0, top),) if top_logprobs else ())
        self.chunks = chunks

    async def choices(self, request: CompletionRequest, ready: GenerationRequest) -> list[GenerationRequest]:
        return [ready]

    def submit(self, request: CompletionRequest, choices: Sequence[Any], log: AnswerLog, prompt: int) -> Self:
        asyncio.get_running_loop().call_soon(self._append, log)
        return self

    def _append(self, log: AnswerLog) -> None:
        with suppress(LlamaclustError):
            for _ in range(self.chunks):
                log.append(0, self.chunk)


class Complete(Long):
    """A completion that ends after its chunks."""

    def _append(self, log: AnswerLog) -> None:
        super()._append(log)
        log.end(0)


@pytest.mark.parametrize(("chunks", "top", "most"), [(300, 0, 256), (2000, 0, 256), (5000, 0, 256), (256, 128, 16)])
async def test_a_late_reader_of_a_long_reply_leaves_others_their_turns(chunks: int, top: int, most: int) -> None:
    kept, turns = kept_by(ReplyCache(ApiSettings())), 0
    await kept.begin(Complete(chunks, top).reply)
    await kept.log.wait_over()
    reading = asyncio.create_task(read_all(kept))
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(reading.result()) == chunks * 657 and turns >= chunks // most
    await kept.aclose()


async def test_running_replies_are_bounded_together() -> None:
    """Checks that unread complete replies are dropped first; then the largest fails, an unread before a read one."""
    cache = ReplyCache(ApiSettings(max_kept_bytes=100_000))
    replies = {"complete": Complete(30), "read": Long(40), "unread": Long(20), "small": Long(1)}
    kept = {name: kept_in(cache, name) for name in replies}
    with kept["read"].reading() as reader:
        for name in ("complete", "small"):
            await kept[name].begin(replies[name].reply)
        await until(lambda: kept["complete"].is_evictable)
        await kept["read"].begin(replies["read"].reply)
        await until(reader.take)  # type: ignore[arg-type]
        assert cache.named("", "complete") is not None
        await kept["unread"].begin(replies["unread"].reply)
        await until(lambda: cache.named("", "complete") is None)
        assert kept["read"].is_running and kept["unread"].is_running and kept["small"].is_running
        more = kept_in(cache, "more")
        await more.begin(Long(40).reply)
        await until(lambda: not more.is_running or not kept["unread"].is_running)
        assert kept["read"].is_running and kept["small"].is_running
        failed = kept["unread"] if more.is_running else more
        with pytest.raises(HttpError, match="exceed 0 MiB together") as error:
            await read_all(failed)
        assert error.value.code == "reply_too_large" and failed.held_bytes == 0
        await until(lambda: bool(replies["unread"].closed) or failed is more)
    await cache.aclose()


async def test_a_reply_that_gave_way_is_not_held_until_it_would_expire() -> None:
    """Checks that a dropped reply is freed at once and that a kept one does not hold its computation."""
    cache = ReplyCache(ApiSettings(max_kept_replies=1, resume_s=600.0))

    async def computed() -> tuple[weakref.ref[KeptReply], weakref.ref[Complete]]:
        kept, reply = kept_in(cache, "a"), Complete(2)
        await kept.begin(reply.reply)
        await until(lambda: kept.is_evictable and reply.closed > 0)
        return weakref.ref(kept), weakref.ref(reply)

    held, source = await computed()
    await until(lambda: gc.collect() >= 0 and source() is None)
    kept_in(cache, "b")
    await until(lambda: gc.collect() >= 0 and held() is None)
    await cache.aclose()


@pytest.mark.parametrize(
    "bounds", [{"max_kept_replies": 4}, {"max_kept_bytes": 8_000}, {"max_kept_replies": 7, "max_kept_bytes": 9_000}]
)
async def test_replies_of_one_owner_take_no_room_from_others(bounds: dict[str, Any]) -> None:
    """Checks that an owner's many replies drop no reply of others and that a new owner's reply is kept."""
    cache = ReplyCache(ApiSettings(**bounds))

    async def keep(owner: str, name: str) -> KeptReply:
        kept = kept_in(cache, name, owner)
        reply = Complete(1)
        await kept.begin(reply.reply)
        await until(lambda: kept.is_evictable)
        return kept

    first = await keep("quiet", "mine")
    for number in range(12):
        await keep("busy", f"busy{number}")
    assert cache.named("", "mine") is first
    assert cache.named("", "busy0") is None and cache.named("", "busy11") is not None
    late = await keep("newcomer", "late")
    for number in range(12):
        await keep("busy", f"more{number}")
    assert (cache.named("", "mine"), cache.named("", "late")) == (first, late)
    await cache.aclose()


async def test_running_replies_of_the_owner_with_the_most_fail_first() -> None:
    cache, kept = ReplyCache(ApiSettings(max_kept_bytes=40_000)), dict[str, KeptReply]()
    sizes = {"a20": 20, "b12": 12, "c5": 5, "d3": 3, "a4": 4, "b15": 15, "c15": 15, "d20": 20}
    for name in sizes:
        kept[name] = kept_in(cache, name, name[0])
    for name, events in sizes.items():
        reply = kept[name]
        await reply.begin(Long(events).reply)
        await until(partial(_has_grown, reply, events))
    assert [name for name, reply in kept.items() if not reply.is_running] == ["a20", "b15"]
    await cache.aclose()


def _has_grown(reply: KeptReply, events: int) -> bool:
    return reply.held_bytes >= events * 1000 or not reply.is_running


async def test_complete_replies_of_all_give_way_before_a_running_one_fails() -> None:
    """Checks that the client with the most loses its replies first, oldest first; all have twice an owner's limit."""
    cache, kept = ReplyCache(ApiSettings(max_kept_bytes=40_000)), dict[str, KeptReply]()
    for number in range(8):
        for name, events in ((f"{number} old", 1), (f"{number} new", number + 2)):
            kept[name] = kept_in(cache, name, f"client {number}")
            await kept[name].begin(Complete(events).reply)
            await until(lambda name=name: kept[name].is_evictable)  # type: ignore[misc]
    running = kept_in(cache, "running", "running")
    await running.begin(Long(30).reply)
    await until(partial(_has_grown, running, 30))
    assert running.is_running
    assert sum(entry.held_bytes for entry in cache._entries.values()) <= 80_000
    left = {name for name in kept if cache.named("", name) is not None}
    assert {"0 old", "0 new", "1 old", "1 new"} <= left and not {"7 old", "6 old"} & left
    await cache.aclose()


@pytest.mark.parametrize(("own", "others"), [(37, (20, 20)), (30, (39,)), (20, (19, 19, 19))])
async def test_replies_of_a_client_within_its_room_do_not_give_way_for_others(
    own: int, others: tuple[int, ...]
) -> None:
    """Checks that replies grow while the total is within the limit of all."""
    cache, running = ReplyCache(ApiSettings(max_kept_bytes=40_000)), list[KeptReply]()
    complete = kept_in(cache, "complete", "a")
    await complete.begin(Complete(5).reply)
    await until(lambda: complete.is_evictable)
    each = {f"other {number}": events for number, events in enumerate(others)} | {"a": own - 8}
    for client, events in each.items():
        reply = kept_in(cache, client, client)
        await reply.begin(Long(events * 4 // 5).reply)
        await until(partial(_has_grown, reply, events * 4 // 5))
        running.append(reply)
    assert all(reply.is_running for reply in running) and cache.named("", "complete") is complete
    await cache.aclose()


@pytest.mark.parametrize("clients", [2, 3, 7])
async def test_a_newcomer_is_kept_where_complete_replies_of_others_take_all_room(clients: int) -> None:
    cache = ReplyCache(ApiSettings(max_kept_bytes=40_000))
    for number in range(200):
        reply = kept_in(cache, f"id{number}", f"client {number % clients}")
        await reply.begin(Complete(1).reply)
        await until(lambda reply=reply: reply.is_evictable)  # type: ignore[misc]
    kept_in(cache, "new", "newcomer", b"x" * 10_000)
    assert cache.named("", "new") is not None
    await cache.aclose()


async def test_the_largest_reply_fails_by_itself_where_it_grows() -> None:
    cache = ReplyCache(ApiSettings(max_kept_bytes=10_000))
    kept, reply = kept_in(cache, "a"), Long(1000)
    await kept.begin(reply.reply)
    await until(lambda: reply.closed > 0)
    assert (kept.is_running, kept.held_bytes) == (False, 0)
    kept_in(cache, "b")
    await cache.aclose()
