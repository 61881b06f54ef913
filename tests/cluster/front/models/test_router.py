"""Checks that each request reaches the endpoint of its model."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from llamaclust.cluster.front import models
from llamaclust.cluster.front.body import read_bytes
from llamaclust.cluster.front.http.responses import Route, add_error_handlers
from llamaclust.cluster.front.models import ApiModel, ModelRouter
from llamaclust.cluster.front.settings import ApiSettings
from support.clusters.served import ScriptedEngine, make_app, says
from support.several_models.api_models import ScriptedLifecycle, named_model

NOT_COMPUTED = (
    *("/input_tokens", "/count_tokens", "/cancel", "/tokenize", "/detokenize", "/apply-template", "/lora-adapters"),
    *("/models/load", "/models/unload", "/slots/{slot}", "/load_lora_adapter", "/unload_lora_adapter"),
    *("/show", "/pull", "/create", "/copy", "/blobs/{digest}", "/push"),
)
"""Ends of POST paths that need no loaded model."""
Endpoint = Callable[[Request], Awaitable[Response]]


@cache
def operations() -> list[Route]:
    """Returns the app's routes."""
    app = make_app(ScriptedEngine(says("a")), slot_folder=Path("/tmp"), allows_pull=True)
    return [route for route in app.routes if isinstance(route, Route)]


def replying(status: int, text: str) -> Endpoint:
    async def reply(request: Request) -> Response:
        return PlainTextResponse(text, status)

    return reply


def client_of(*models: ApiModel, endpoint: Endpoint | None = None) -> httpx.AsyncClient:
    """Returns a client of the app's routes, which reply with the model's name unless an endpoint is given."""
    routing = ModelRouter(models)

    def route(of: Route, model: ApiModel) -> Route:
        answer = endpoint or replying(200, model.name)
        return Route(of.method, of.path, answer, computes=of.computes)

    app = Starlette(routes=[routing.route([route(of, model) for model in models]) for of in operations()])
    add_error_handlers(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")


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
    models = named_model("x"), named_model("x:latest", aliases=("alias",)), named_model("y")
    async with client_of(*models) as http:
        assert (await http.post("/api/chat", json={"model": name})).text == model
        assert (await http.post("/tokenize", json={"name": name})).text == model
        assert (await http.get("/lora-adapters", params={"model": name})).text == model
        assert (await http.post("/lora-adapters", params={"model": name}, json=[])).text == model
        assert (await http.request("DELETE", "/api/delete", json={"model": name})).text == model
        refused = await http.post("/api/chat", json={"model": f"{name}:other"})
        assert refused.status_code == 404 and "'x', 'x:latest', 'y'" in refused.text
        assert (await http.get("/lora-adapters", params={"model": f"{name}:other"})).status_code == 404


async def test_a_single_model_that_stays_loaded_gets_every_name() -> None:
    single = named_model("a", can_unload=False, load_on_demand=False)
    async with client_of(single) as http:
        for name in ("a", "b", 5, None):
            assert (await http.post("/v1/completions", json={"model": name})).text == "a"
        assert (await http.get("/lora-adapters", params={"model": "b"})).text == "a"
        assert ModelRouter([single]).named("b") is single


async def test_a_body_that_is_no_object_is_left_to_the_first_model() -> None:
    async with client_of(named_model("a"), named_model("b")) as http:
        for content in (b"no json", b"[1]", b""):
            assert (await http.post("/api/chat", content=content)).text == "a"


async def test_a_number_that_no_reply_could_show_is_refused() -> None:
    async with client_of(named_model("a"), named_model("b")) as http:
        refused = await http.post("/v1/completions", content=b'{"model": "b", "temperature": 1e999}')
    assert refused.status_code == 400 and "temperature: must be a finite number" in refused.text


@pytest.mark.parametrize(("status", "seconds"), [(200, 300.0), (400, None)])
async def test_the_keep_alive_of_a_refused_request_does_not_count(status: int, seconds: float | None) -> None:
    lifecycle = ScriptedLifecycle()
    async with client_of(named_model("a", lifecycle), endpoint=replying(status, "")) as http:
        assert (await http.post("/api/chat", json={"keep_alive": "5m"})).status_code == status
    assert lifecycle.keep_alive_s == seconds and lifecycle.is_idle


async def test_the_keep_alive_of_a_request_without_a_reply_does_not_count() -> None:
    lifecycle = ScriptedLifecycle()

    async def fail(request: Request) -> Response:
        raise RuntimeError

    async with client_of(named_model("a", lifecycle), endpoint=fail) as http:
        with pytest.raises(RuntimeError):
            await http.post("/api/chat", json={"messages": [{}], "keep_alive": "5m"})
    assert lifecycle.keep_alive_s is None and lifecycle.is_idle


@pytest.mark.parametrize(
    ("path", "body", "is_idle", "seconds"),
    [
        ("/api/chat", {"messages": [{}], "keep_alive": 0}, False, 0.0),
        ("/api/embed", {"input": "a", "keep_alive": "1h"}, False, 3600.0),
        ("/api/generate", {}, False, None),
        ("/api/generate", {"keep_alive": 0}, True, 0.0),
        ("/v1/chat/completions", {"messages": [{}], "keep_alive": "5m"}, True, None),
        ("/api/show", {"keep_alive": "5m"}, True, None),
    ],
)
async def test_a_request_of_ollamas_clients_keeps_its_model_awake(
    path: str, body: dict[str, Any], is_idle: bool, seconds: float | None
) -> None:
    lifecycle = ScriptedLifecycle()

    async def look(request: Request) -> Response:
        return PlainTextResponse(str(lifecycle.is_idle))

    async with client_of(named_model("a"), named_model("b", lifecycle), endpoint=look) as http:
        assert (await http.post(path, json={"model": "b", **body})).text == str(is_idle)
    assert lifecycle.is_idle and lifecycle.keep_alive_s == seconds


@pytest.mark.parametrize("path", ["/v1/completions", "/api/chat"])
async def test_a_body_is_read_once_and_not_held_while_it_is_answered(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[object]] = []

    class Fields(dict[str, Any]):
        """A dict that weak references can refer to."""

    async def parse(data: bytes) -> dict[str, Any]:
        fields = Fields(json.loads(data))
        held.append(weakref.ref(fields))
        return fields

    async def answer(request: Request) -> Response:
        body = await read_bytes(request, ApiSettings())
        assert json.loads(body)["model"] == "a"
        return PlainTextResponse(f"{held[0]() is None} {sys.getrefcount(body)}")

    monkeypatch.setattr(models, "parse_object_in_time", parse)
    async with client_of(named_model("a"), endpoint=answer) as http:
        reply = await http.post(path, json={"model": "a", "messages": ["abc"] * 100, "keep_alive": "5m"})
    assert reply.text == "True 2", "held by the endpoint and by the count's argument alone"


async def test_an_endpoint_takes_less_than_was_read() -> None:
    async def answer(request: Request) -> Response:
        return PlainTextResponse(await read_bytes(request, ApiSettings(), 20))

    async def parts() -> AsyncIterator[bytes]:
        """Yields a body, which is sent without a Content-Length."""
        for part in (b"[", b" " * 19, b"]"):
            yield part

    async with client_of(named_model("a"), endpoint=answer) as http:
        assert (await http.post("/lora-adapters", content=b"[" + b" " * 18 + b"]")).status_code == 200
        refused = await http.post("/lora-adapters", content=parts())
    assert refused.status_code == 413 and "larger than 20 bytes" in refused.text


async def test_without_demand_a_request_loads_no_model() -> None:
    lifecycle = ScriptedLifecycle()
    lifecycle.is_asleep = True
    async with client_of(named_model("a", lifecycle, kept=("kept",), load_on_demand=False)) as http:
        refused = await http.post("/v1/chat/completions", json={"model": "a"})
        assert refused.status_code == 400 and "POST /models/load" in refused.json()["error"]["message"]
        assert (await http.post("/api/chat", json={"model": "a", "messages": [{}]})).status_code == 400
        assert (await http.post("/api/chat", json={"model": "a", "keep_alive": 0})).text == "a"
        for path in ("/tokenize", "/api/show", "/v1/messages/count_tokens"):
            assert (await http.post(path, json={"model": "a"})).text == "a", path
        again = {"Idempotency-Key": "kept"}
        assert (await http.post("/v1/completions", json={"model": "a"}, headers=again)).text == "a"
        lifecycle.is_idle = False  # unloaded although it has requests
        assert (await http.post("/v1/chat/completions", json={"model": "a"})).text == "a"
        lifecycle.is_asleep, lifecycle.is_idle = False, True
        assert (await http.post("/v1/chat/completions", json={"model": "a"})).text == "a"


def test_every_path_of_a_body_needs_a_loaded_model_or_does_not() -> None:
    posts = {route.path: route.computes for route in operations() if route.method == "POST"}
    assert posts == {path: not path.endswith(NOT_COMPUTED) for path in posts}
