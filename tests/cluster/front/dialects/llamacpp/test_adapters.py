"""Tests of adapters over HTTP: as model names in all APIs, in llama.cpp's field `lora`, and in the lists of both."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import new_context
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.adapters import ServedAdapter, ServedAdapters
from llamaclust.core.limits import AdapterScales
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says

ADAPTERS = (ServedAdapter("poet", "/models/poet.gguf"), ServedAdapter("clerk", "/models/clerk.gguf", -0.5))
MESSAGES = [{"role": "user", "content": "Hi"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/completion": {"prompt": "Hi"},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "Hi", "stream": False},
    "/api/generate raw": {"prompt": "Hi", "stream": False, "raw": True},
}


async def post(path: str, body: Any, **settings: Any) -> tuple[httpx.Response, AdapterScales | None]:
    """Returns the reply and the adapters of the engine's request."""
    engine = ScriptedEngine(says("So."))
    async with client(make_app(engine, adapters=ServedAdapters(ADAPTERS), **settings)) as http:
        reply = await http.post(path.partition(" ")[0], json=body)
    return reply, engine.submitted[0].adapters if engine.submitted else None


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(("name", "scales"), [("poet", ((0, 1.0),)), ("clerk", ((1, -0.5),)), (MODEL, ())])
async def test_an_adapter_is_named_as_the_model(path: str, name: str, scales: AdapterScales) -> None:
    reply, chosen = await post(path, REQUESTS[path] | {"model": name})
    assert reply.status_code == 200, reply.text
    assert chosen == scales
    assert path == "/completion" or reply.json()["model"] == name


@pytest.mark.parametrize("path", [path for path in REQUESTS if not path.startswith("/api")])
async def test_lora_chooses_several_with_scales(path: str) -> None:
    lora = [{"id": 1, "scale": 2}, {"id": 0, "scale": 0.25}]
    reply, chosen = await post(path, REQUESTS[path] | {"model": MODEL, "lora": lora})
    assert reply.status_code == 200, reply.text
    assert chosen == ((0, 0.25), (1, 2.0))
    _, chosen = await post(path, REQUESTS[path] | {"model": MODEL, "lora": [{"id": 0, "scale": 0}]})
    assert chosen == ()
    if path == "/completion":
        assert reply.json()["generation_settings"]["lora"] == [{"id": 0, "scale": 0.25}, {"id": 1, "scale": 2.0}]


@pytest.mark.parametrize(
    "lora",
    [
        [{"id": 2, "scale": 1}],
        [{"id": 2, "scale": 0}],
        [{"id": -1, "scale": 1}],
        [{"id": True, "scale": 1}],
        [{"id": 0}],
        [{"id": 0, "scale": "1"}],
        [{"id": 0, "scale": 1e9}],
        [{"id": 0, "scale": 1}, {"id": 0, "scale": 1}],
        [{"id": 0, "scale": 1, "name": "poet"}],
        [[0, 1]],
        {"id": 0, "scale": 1},
        [{"id": 0, "scale": 1}] * 17,
    ],
)
async def test_bad_choices_are_refused(lora: Any) -> None:
    reply, chosen = await post("/completion", {"prompt": "Hi", "lora": lora})
    assert (reply.status_code, chosen) == (400, None), reply.text
    assert reply.json()["error"]["param"] == "lora"


async def test_counts_take_the_names_of_adapters() -> None:
    for path in ("/v1/chat/completions/input_tokens", "/v1/messages/count_tokens"):
        reply, _ = await post(path, {"messages": MESSAGES, "model": "poet"})
        assert reply.status_code == 200, reply.text


async def test_a_name_and_a_choice_contradict_each_other() -> None:
    reply, _ = await post("/v1/completions", {"prompt": "Hi", "model": "poet", "lora": []})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embedding", "/api/embed"])
async def test_embeddings_are_the_models_alone(path: str) -> None:
    reply, _ = await post(path, {"input": "Hi", "model": "poet"})
    assert reply.status_code == 400 and "poet" in reply.text, reply.text


async def test_lists_have_the_adapters() -> None:
    async with client(make_app(ScriptedEngine(says("So.")), adapters=ServedAdapters(ADAPTERS))) as http:
        listed = (await http.get("/lora-adapters")).json()
        assert listed[1] == {"id": 1, "name": "clerk", "path": "clerk.gguf", "scale": 0.0}
        models = (await http.get("/v1/models")).json()["data"]
        assert [(model["id"], model.get("parent")) for model in models] == [
            (MODEL, None),
            ("poet", MODEL),
            ("clerk", MODEL),
        ]
        assert (await http.get("/v1/models/poet")).json() == models[1]
        tags = (await http.get("/api/tags")).json()["models"]
        assert [tag["name"] for tag in tags] == [f"{name}:latest" for name in (MODEL, "poet", "clerk")]


async def test_adapters_have_no_copies() -> None:
    """Checks that copies are refused, since after a restart their names would mean the model without the adapter."""
    async with client(make_app(ScriptedEngine(says("So.")), adapters=ServedAdapters(ADAPTERS))) as http:
        for source, destination in (("poet:latest", "bard"), ("poet", MODEL), (MODEL, "poet"), ("poet", "clerk")):
            for path, body in (
                ("/api/copy", {"source": source, "destination": destination}),
                ("/api/create", {"from": source, "model": destination}),
            ):
                reply = await http.post(path, json=body)
                assert reply.status_code == 403 and "`adapters` in the cluster file" in reply.text, reply.text
        assert (await http.post("/api/copy", json={"source": MODEL, "destination": "other"})).status_code == 200
        names = [tag["name"] for tag in (await http.get("/api/tags")).json()["models"]]
    assert names == [f"{name}:latest" for name in (MODEL, "poet", "clerk", "other")]


@pytest.mark.parametrize("path", REQUESTS)
async def test_scales_of_all_requests_are_of_those_that_choose_none(path: str) -> None:
    engine = ScriptedEngine(says("So."))
    async with client(make_app(engine, adapters=ServedAdapters(ADAPTERS))) as http:
        choices: list[list[dict[str, float]]] = [
            [{"id": 1, "scale": 0.5}, {"id": 0, "scale": 0}],
            [{"id": 0, "scale": 2}],
        ]
        for scales in (*choices, []):
            reply = await http.post("/lora-adapters", json=scales)
            assert (reply.status_code, reply.json()) == (200, {"success": True})
            wanted = {entry["id"]: float(entry["scale"]) for entry in scales if entry["scale"]}
            shown = {entry["id"]: entry["scale"] for entry in (await http.get("/lora-adapters")).json()}
            assert shown == {0: 0.0, 1: 0.0} | wanted, "adapters that are not listed have 0"
            where = path.partition(" ")[0]
            bodies = [REQUESTS[path] | {"model": MODEL}, REQUESTS[path] | {"model": "poet"}]
            if not path.startswith("/api"):
                bodies += [REQUESTS[path] | {"model": MODEL, "lora": lora} for lora in ([], [{"id": 1, "scale": 3}])]
            for body in bodies:
                assert (await http.post(where, json=body)).status_code == 200
            found = [request.adapters for request in engine.submitted[-len(bodies) :]]
            assert found == [tuple(wanted.items()), ((0, 1.0),), (), ((1, 3.0),)][: len(bodies)]


async def test_only_the_first_key_sets_scales_of_all_requests() -> None:
    app = make_app(ScriptedEngine(says("So.")), adapters=ServedAdapters(ADAPTERS), api_keys=("admin-key", "other-key"))
    async with client(app) as http:
        found = []
        for headers in ({}, {"X-Api-Key": "other-key"}, {"Authorization": "Bearer admin-key"}):
            reply = await http.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}], headers=headers)
            listed = await http.get("/lora-adapters", headers={"X-Api-Key": "other-key"})
            found.append((reply.status_code, listed.json()[1]["scale"]))
    assert found == [(401, 0.0), (403, 0.0), (200, 0.5)]


async def test_changes_of_scales_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llamaclust")
    async with client(make_app(ScriptedEngine(says("So.")), adapters=ServedAdapters(ADAPTERS))) as http:
        for scales in ([{"id": 1, "scale": 0.5}], [{"id": 1, "scale": 0.5}], []):
            await http.post("/lora-adapters", json=scales)
    lines = [record.getMessage() for record in caplog.records if "scales" in record.getMessage()]
    assert lines == [
        "a client set the default scales of adapters: 1 'clerk': 0.5",
        "a client set the default scales of adapters: all 0",
    ]


async def test_a_request_keeps_the_scales_of_its_admission() -> None:
    """Checks that a request keeps its journalled scales, whatever clients set meanwhile."""
    engine, adapters = ScriptedEngine(says("So.")), ServedAdapters(ADAPTERS, default=((1, 0.5),))
    replies = Replies(ApiSettings(adapters=adapters))
    context = new_context(Headers(), "/completion", replies.settings)
    make_app(engine, replies=replies)
    reply = await replies._endpoints["", "/completion"](b'{"prompt": "Hi"}', context)
    adapters.default = ()
    direct = KeptReply(context, replies.cache, is_kept=False)
    await direct.begin(reply)
    assert engine.submitted[0].adapters == ((1, 0.5),)
    await direct.aclose()


@pytest.mark.parametrize(
    "body", [b"[", b"{}", b"null", b'[{"id": 2, "scale": 1}]', b'[{"id": 0, "scale": 1e999}]', b'[{"id": 0}]']
)
async def test_bad_scales_of_all_requests_change_nothing(body: bytes) -> None:
    async with client(make_app(ScriptedEngine(says("So.")), adapters=ServedAdapters(ADAPTERS))) as http:
        assert (await http.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}])).status_code == 200
        reply = await http.post("/lora-adapters", content=body)
        assert reply.status_code == 400, reply.text
        assert [entry["scale"] for entry in (await http.get("/lora-adapters")).json()] == [0.0, 0.5]
