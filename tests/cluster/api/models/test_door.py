"""The door passes each request to the app of its model."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from llamaclust.cluster.api.models import door
from llamaclust.cluster.api.models.door import COMPUTED, DoorModel, ModelDoor
from llamaclust.cluster.api.openapi import ApiRoute
from llamaclust.cluster.api.settings import ApiSettings
from support.clusters.served import ScriptedEngine, make_app, says
from support.several_models.door_models import ScriptedResident, door_model

NOT_COMPUTED = (
    *("/input_tokens", "/count_tokens", "/cancel", "/tokenize", "/detokenize", "/apply-template", "/lora-adapters"),
    *("/models/load", "/models/unload", "/slots/{slot}", "/load_lora_adapter", "/unload_lora_adapter"),
    *("/show", "/pull", "/create", "/copy", "/blobs/{digest}", "/push"),
)
"""Paths of bodies that need none."""


def replying(name: str, aliases: tuple[str, ...] = (), kept: Sequence[str] = ()) -> DoorModel:
    """With its name."""
    return door_model(name, PlainTextResponse(name), aliases=aliases, kept=kept)


def client_of(*models: DoorModel) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(ModelDoor(models, ApiSettings()))
    return httpx.AsyncClient(transport=transport, base_url="http://door")


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/streams/plain", "b"),
        ("/v1/streams/chats/7", "b"),
        ("/v1/stream/chats/7", "b"),
        ("/v1/stream?conv_id=chats%2F7", "b"),
        ("/v1/responses/resp_1/input_items", "b"),
        ("/v1/responses/resp_1", "b"),
        ("/v1/streams/my-chat/compact", "b"),
        ("/v1/streams/chats", "a"),
        ("/v1/streams/none", "a"),
    ],
)
async def test_a_kept_reply_is_found_with_its_model(path: str, model: str) -> None:
    async with client_of(replying("a"), replying("b", kept=("plain", "chats/7", "resp_1", "my-chat/compact"))) as http:
        assert (await http.get(path)).text == model
        assert (await http.delete(path)).text == model


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("x", "x"),
        ("x:latest", "x:latest"),
        ("alias", "x:latest"),
        ("alias:latest", "x:latest"),
        ("y:latest", "y"),
        ("", "x"),
    ],
)
async def test_a_name_that_a_model_has_as_a_whole_precedes_one_without_its_tag(name: str, model: str) -> None:
    models = replying("x"), replying("x:latest", aliases=("alias",)), replying("y")
    async with client_of(*models) as http:
        assert (await http.post("/api/chat", json={"model": name})).text == model
        assert (await http.get("/props", params={"model": name})).text == model
        assert (await http.post("/lora-adapters", params={"model": name}, json=[])).text == model
        refused = await http.post("/api/chat", json={"model": f"{name}:other"})
        assert refused.status_code == 404 and "'x', 'x:latest', 'y'" in refused.text


async def test_a_body_that_is_no_object_is_left_to_the_first_app() -> None:
    async with client_of(replying("a"), replying("b")) as http:
        for content in (b"no json", b"[1]", b""):
            assert (await http.post("/api/chat", content=content)).text == "a"


@pytest.mark.parametrize(("status", "seconds"), [(200, 300.0), (400, None)])
async def test_the_keep_alive_of_a_refused_request_does_not_count(status: int, seconds: float | None) -> None:
    resident = ScriptedResident()
    async with client_of(door_model("a", PlainTextResponse("", status), resident)) as http:
        assert (await http.post("/api/chat", json={"keep_alive": "5m"})).status_code == status
    assert resident.keep_alive_s == seconds


@pytest.mark.parametrize("path", ["/v1/completions", "/api/chat"])
async def test_a_body_is_not_held_while_it_is_answered(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[object]] = []

    class Fields(dict[str, Any]):
        """Whose end can be seen."""

    async def parse(data: bytes) -> dict[str, Any]:
        fields = Fields(json.loads(data))
        held.append(weakref.ref(fields))
        return fields

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        assert json.loads(body)["model"] == "a"
        await PlainTextResponse(f"{held[0]() is None} {sys.getrefcount(body)}")(scope, receive, send)

    monkeypatch.setattr(door, "parse_object_in_time", parse)
    async with client_of(door_model("a", answer)) as http:
        reply = await http.post(path, json={"model": "a", "messages": ["abc"] * 100, "keep_alive": "5m"})
    assert reply.text == "True 2", "held by the app and by the count's argument alone"


async def test_without_demand_a_request_loads_no_model() -> None:
    resident = ScriptedResident()
    resident.is_asleep = True
    model = door_model("a", PlainTextResponse("a"), resident, kept=("kept",))
    transport = httpx.ASGITransport(ModelDoor([model], ApiSettings(load_on_demand=False)))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:
        refused = await http.post("/v1/chat/completions", json={"model": "a"})
        assert refused.status_code == 400 and "POST /models/load" in refused.json()["error"]["message"]
        assert (await http.post("/api/chat", json={"model": "a", "messages": [{}]})).status_code == 400
        assert (await http.post("/api/chat", json={"model": "a", "keep_alive": 0})).text == "a"
        for path in ("/cluster/workers/w/drain", "/tokenize", "/api/show", "/none"):
            assert (await http.post(path, json={"model": "a"})).text == "a", path
        again = {"Idempotency-Key": "kept"}
        assert (await http.post("/v1/completions", json={"model": "a"}, headers=again)).text == "a"
        resident.is_idle = False  # it gave way
        assert (await http.post("/v1/chat/completions", json={"model": "a"})).text == "a"
        resident.is_asleep, resident.is_idle = False, True
        assert (await http.post("/v1/chat/completions", json={"model": "a"})).text == "a"


def test_every_path_of_a_body_needs_a_loaded_model_or_does_not() -> None:
    app = make_app(ScriptedEngine(says("a")), slot_folder=Path("/tmp"), allows_pull=True)
    posts = {route.path for route in app.routes if isinstance(route, ApiRoute) and route.method == "POST"}
    assert posts & COMPUTED == posts - {path for path in posts if path.endswith(NOT_COMPUTED)}
