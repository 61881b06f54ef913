"""Checks that kept replies of several models share a client's names for them and their bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, read_journal
from support.clusters.resumable import KilledJournal
from support.clusters.served import ScriptedEngine, client, make_service, says, until
from support.several_models.api_models import api_model

NAMES = ("ma", "mb")
CONVERSATION = {"X-Conversation-Id": "c"}
KEY = {"Idempotency-Key": "k"}


@dataclass
class Shared:
    engines: dict[str, ScriptedEngine]
    http: httpx.AsyncClient
    replies: Replies

    async def posted(self, model: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": model, "prompt": "Hi", **fields}, headers=headers)


@asynccontextmanager
async def shared(journal: Journal | None = None, **settings: Any) -> AsyncIterator[Shared]:
    """Yields a server of two models, each of which answers with its own name."""
    engines = {name: ScriptedEngine(says(name)) for name in NAMES}
    async with aclosing(Replies(ApiSettings(can_unload=True, **settings), journal)) as replies:
        models = [
            api_model(
                make_service(engine, name=name),
                engine,  # type: ignore[arg-type]
                ApiSettings(can_unload=True, digest=name, **settings),
                replies=replies,
            )
            for name, engine in engines.items()
        ]
        async with client(create_app(models)) as http:
            yield Shared(engines, http, replies)


@pytest.mark.parametrize("path", ["/v1/stream?conv_id=c", "/v1/stream/c"])
async def test_a_conversation_has_one_stream_whatever_model_it_goes_on_with(path: str) -> None:
    async with shared() as api:
        for name in NAMES:
            assert (await api.posted(name, CONVERSATION, stream=True)).status_code == 200
            read = await api.http.get(path)
            assert f'"model":"{name}"' in read.text, read.text
        assert (await api.http.delete(path)).status_code == 204
        assert (await api.http.get(path)).status_code == 404


async def test_a_request_to_another_model_ends_the_conversations_running_one() -> None:
    async with shared() as api:
        api.engines["ma"].gate.clear()
        asking = asyncio.create_task(api.posted("ma", CONVERSATION, stream=True))
        await until(lambda: api.engines["ma"].running == 1)
        assert (await api.posted("mb", CONVERSATION)).json()["choices"][0]["text"] == "mb"
        assert "cancelled" in (await asking).text and not api.engines["ma"].running


@pytest.mark.parametrize("in_query", [False, True])
async def test_an_idempotency_key_of_another_models_request_is_refused(in_query: bool) -> None:
    async with shared() as api:
        for name, status in (("ma", 200), ("mb", 422), ("ma", 200)):
            body: dict[str, Any] = {"prompt": "Hi"} if in_query else {"prompt": "Hi", "model": name}
            query = {"model": name} if in_query else {}
            reply = await api.http.post("/v1/completions", params=query, json=body, headers=KEY)
            assert reply.status_code == status, reply.text
            assert status == 200 or reply.json()["error"]["code"] == "idempotency_key_reused"
        assert [len(engine.submitted) for engine in api.engines.values()] == [1, 0]


async def test_the_bounds_of_kept_replies_are_those_of_all_models() -> None:
    async with shared(max_kept_replies=1) as api:
        for name in NAMES:
            await api.posted(name, {"Idempotency-Key": name})
        kept = [(await api.http.get(f"/v1/streams/{name}")).status_code for name in NAMES]
        assert kept == [404, 200]


@pytest.mark.parametrize("prefix", ["/v1/responses", "/responses"])
async def test_a_response_is_found_whatever_model_made_it(prefix: str) -> None:
    async with shared() as api:
        for name in NAMES:
            made = (await api.http.post("/v1/responses", json={"model": name, "input": "Hi"})).json()
            one = f"{prefix}/{made['id']}"
            assert (await api.http.get(one)).json()["model"] == name
            assert (await api.http.get(f"{one}/input_items")).status_code == 200
            assert (await api.http.delete(one)).json()["deleted"]
        api.engines["mb"].gate.clear()
        made = (await api.http.post(prefix, json={"model": "mb", "input": "Hi", "background": True})).json()
        assert (await api.http.post(f"{prefix}/{made['id']}/cancel")).json()["status"] == "cancelled"
        assert not api.engines["mb"].running


async def test_a_restored_request_is_computed_on_its_own_model(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with aclosing(KilledJournal(path, ControlRecord(), 60.0)) as killed, shared(killed, request_s=60.0) as api:
        for name in NAMES:
            assert (await api.posted(name, {"Idempotency-Key": f"of-{name}"})).status_code == 200
    left = read_journal(path, Instant.now())
    assert [request.served for request in left] == [*NAMES]
    async with aclosing(Journal(path, ControlRecord(), 60.0)) as journal, shared(journal, request_s=60.0) as api:
        await api.replies.restore(left)
        for name in NAMES:
            reply = json.loads((await api.http.get(f"/v1/streams/of-{name}")).text)
            assert (reply["model"], reply["choices"][0]["text"]) == (name, name)
        assert (await api.posted("mb", {"Idempotency-Key": "of-ma"})).status_code == 422
        assert (await api.posted("ma", {"Idempotency-Key": "of-ma"})).json()["model"] == "ma"
        assert [len(engine.submitted) for engine in api.engines.values()] == [1, 1]


@pytest.mark.parametrize("path", ["/api/copy", "/api/create"])
async def test_a_copy_is_a_name_of_the_model_that_it_is_made_of(path: str) -> None:
    async with shared() as several:
        http = several.http

        async def copied(source: str, name: str) -> httpx.Response:
            fields = ("source", "destination") if path == "/api/copy" else ("from", "model")
            return await http.post(path, json=dict(zip(fields, (source, name), strict=True)))

        assert (await copied("mb:latest", "poet")).status_code == 200
        for name in ("poet", "poet:latest"):
            generated = await http.post("/api/generate", json={"model": name, "prompt": "Hi", "stream": False})
            assert (generated.json()["model"], generated.json()["response"]) == ("mb", "mb")
            assert (await several.posted(name, {})).json()["choices"][0]["text"] == "mb"
        for source, name, status in (("ma", "poet", 403), ("ma", "mb", 403), ("other", "a", 404), ("mb", "poet", 200)):
            assert (await copied(source, name)).status_code == status, (source, name)
        assert (await http.request("DELETE", "/api/delete", json={"model": "poet"})).status_code == 200
        assert (await several.posted("poet", {})).status_code == 404


@pytest.mark.parametrize("name", ["mb", "mb:latest"])
async def test_a_name_with_its_tag_is_known_to_the_endpoints_of_the_model(name: str) -> None:
    async with shared() as several:
        reply = await several.posted(name, {})
        assert (reply.status_code, reply.json()["model"]) == (200, "mb")
        assert (await several.http.get(f"/v1/models/{name}")).json()["id"] == "mb"
        pulled = await several.http.post("/api/pull", json={"model": name, "stream": False})
        assert pulled.json() == {"status": "success"}
        assert (await several.http.post("/api/pull", json={"model": "other"})).status_code == 403
        assert (await several.posted("mb:other", {})).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/live"])
async def test_the_names_of_models_are_for_those_with_a_key(path: str) -> None:
    async with shared(api_keys=("first-key",)) as server:
        refused = await server.http.get(path, params={"model": "x"})
        told = await server.http.get(path, params={"model": "x"}, headers={"Authorization": "Bearer first-key"})
    assert refused.status_code == told.status_code == 404
    assert "only 'ma', 'mb'" in told.json()["error"]["message"] and "ma" not in refused.text
