"""A served model whose replies are kept and journalled, and readers of its event streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext, read_journal
from support.clusters.fakes import FakePipeline
from support.clusters.served import SETTINGS, make_app, real_engine, serving, until

PATHS = ("/v1/completions", "/v1/chat/completions", "/completion")
KEY = {"Idempotency-Key": "one"}
READS_IDS = {"Accept": "text/event-stream"}
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
    """A journal that records no end of a request, as after a kill of the coordinator."""

    def end(self, request_id: str) -> None:
        pass

    async def aclose(self) -> None:
        self.seal()
        await super().aclose()


@asynccontextmanager
async def served(
    journal: Path, kind: type[Journal] = Journal, prefill_chunk: int | None = None, **more: Any
) -> AsyncIterator[Served]:
    """Runs a server that first restores the journal's requests."""
    settings = {"first_chunk_s": 0.02} | more
    resume_s = ApiSettings(**settings).resume_s
    async with (
        real_engine(replace(SETTINGS, prefill_chunk=prefill_chunk)) as (engine, pipeline),
        aclosing(kind(journal, ControlRecord(), resume_s)) as opened,
        aclosing(Replies(ApiSettings(**settings, digest=SERVED, request_s=60.0), opened)) as replies,
    ):
        app = make_app(engine, replies=replies, **settings)
        left = read_journal(journal, Instant.now())
        await replies.restore(left)
        async with (
            serving(app) as address,
            httpx.AsyncClient(base_url=address, headers=READS_IDS, trust_env=False, timeout=20) as http,
        ):
            yield Served(engine, pipeline, http, replies)


Event = tuple[str, dict[str, Any] | str]


class EventLines:
    """A parser of lines of server-sent events with ids."""

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
    """Returns the contents of each choice's events in order, without timings and counts of cached tokens."""
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
    """Asserts equal events without pytest's comparison of long lists, which takes minutes."""
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


async def leave_early(server: Served, body: dict[str, Any]) -> None:
    """Sends a request with an idempotency key, and closes the connection when the engine has the request."""
    asking = asyncio.create_task(server.http.post(PATHS[0], json=body, headers=KEY))
    await until(lambda: not is_idle(server.engine))
    asking.cancel()
    await asyncio.wait([asking])


async def write_journal(path: Path, *admissions: RequestContext) -> None:
    async with aclosing(Journal(path, ControlRecord(), 60.0)) as journal:
        for admission in admissions:
            await journal.admit(admission)


def admission(number: int, body: str, *, endpoint: str = PATHS[0], is_streamed: bool = True) -> RequestContext:
    return RequestContext(
        id=f"{number:024x}",
        seed=7,
        created=1,
        idempotency_key=f"key {number}",
        endpoint=endpoint,
        body=body.encode(),
        admitted=Instant.now(),
        limit_s=1e9,
        served=SERVED,
        is_streamed=is_streamed,
    )
