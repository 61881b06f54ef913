"""Tests of vLLM's endpoints that load and unload adapters: access, forwarded values and replies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.models import AdapterControl
from llamaclust.cluster.front.replies.handlers import Replies
from llamaclust.cluster.front.replies.kept_reply import KeptReply
from llamaclust.cluster.front.replies.reply import new_context
from llamaclust.cluster.front.settings import ApiSettings, ModelNames
from llamaclust.cluster.state.adapters import AdapterUnloadedError, ServedAdapter, ServedAdapters
from llamaclust.core.errors import InsufficientMemoryError
from support.clusters.fakes import FakePipeline
from support.clusters.served import SETTINGS, ScriptedEngine, client, make_app, make_service, real_engine, says, until
from support.several_models.api_models import api_model

PATH, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BODY = {"lora_name": "poet", "lora_path": "poet.gguf"}


@dataclass
class Loader:
    """A loader that the endpoints control."""

    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    error: Exception | None = None
    loaded: list[tuple[str, str]] = field(default_factory=list)

    async def load(self, name: str, path: str) -> None:
        if self.error is not None:
            raise self.error
        self.loaded.append((name, path))
        self.adapters.add(len(self.adapters.numbers), ServedAdapter(name, path, content="ab"))

    async def unload(self, name: str) -> None:
        if self.error is not None:
            raise self.error
        number = self.adapters.number_of(name)
        assert number is not None
        self.adapters.remove(number)


def app(
    loader: Loader, folder: Path | None = Path("/adapters"), engine: ScriptedEngine | None = None, **settings: Any
) -> Any:
    return make_app(
        engine or ScriptedEngine(says("So.")),
        control=AdapterControl(loader.load, loader.unload),
        adapters=loader.adapters,
        adapter_folder=folder,
        **settings,
    )


async def test_a_loaded_adapter_is_listed_and_named_by_requests() -> None:
    loader = Loader()
    async with client(app(loader)) as http:
        before = await http.post("/v1/completions", json={"model": "poet", "prompt": "Hi"})
        assert before.status_code == 404 and before.json()["error"]["code"] == "model_not_found"
        reply = await http.post(PATH, json={**BODY, "load_inplace": False})
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
        assert loader.loaded == [("poet", "poet.gguf")]
        listed = [entry["id"] for entry in (await http.get("/v1/models")).json()["data"]]
        assert listed == ["tiny", "poet"]
        assert (await http.get("/lora-adapters")).json() == [
            {"id": 0, "name": "poet", "path": "poet.gguf", "scale": 0.0}
        ]
        assert "poet:latest" in [model["name"] for model in (await http.get("/api/tags")).json()["models"]]
        after = await http.post("/v1/completions", json={"model": "poet", "prompt": "Hi"})
        assert after.status_code == 200 and after.json()["model"] == "poet"


async def test_an_unloaded_adapter_is_neither_listed_nor_named_by_requests() -> None:
    async with client(app(Loader())) as http:
        await http.post(PATH, json=BODY)
        assert (await http.post("/v1/completions", json={"model": "poet", "prompt": "Hi"})).status_code == 200
        reply = await http.post(UNLOAD, json={"lora_name": "poet", "lora_int_id": 7})
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
        assert [entry["id"] for entry in (await http.get("/v1/models")).json()["data"]] == ["tiny"]
        assert (await http.get("/lora-adapters")).json() == []
        assert [model["name"] for model in (await http.get("/api/tags")).json()["models"]] == ["tiny:latest"]
        after = await http.post("/v1/completions", json={"model": "poet", "prompt": "Hi"})
        assert after.status_code == 404 and after.json()["error"]["code"] == "model_not_found"
        numbered = await http.post("/v1/completions", json={"lora": [{"id": 0, "scale": 1.0}], "prompt": "Hi"})
        assert numbered.status_code == 400 and "adapter 0" in numbered.json()["error"]["message"]


async def test_requests_use_an_adapter_until_they_end() -> None:
    loader, engine = Loader(), ScriptedEngine(says("So."))
    loader.adapters.add(0, ServedAdapter("poet", "poet.gguf", content="ab"))
    engine.gate.clear()
    async with client(app(loader, engine=engine)) as http:
        bodies: list[dict[str, Any]] = [{"model": "poet", "n": 2}, {"lora": [{"id": 0, "scale": 0.5}]}, {}]
        posts = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "Hi", **body})) for body in bodies]
        await until(lambda: len(engine.submitted) == 3)
        assert loader.adapters.uses(0) == 2
        engine.gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*posts)] == [200, 200, 200]
    await until(lambda: loader.adapters.uses(0) == 0)


@pytest.mark.parametrize("is_another_loaded", [False, True])
async def test_a_request_that_chose_an_adapter_before_its_unload_is_refused(is_another_loaded: bool) -> None:
    """Checks that the request is refused even if another adapter has the number by then."""
    engine, loader = ScriptedEngine(says("So.")), Loader()
    loader.adapters.add(0, ServedAdapter("poet", "poet.gguf", content="ab"))
    replies = Replies(ApiSettings(adapters=loader.adapters))
    make_app(engine, replies=replies)
    context = new_context(Headers(), "/v1/completions", replies.settings)
    reply = await replies._endpoints["", "/v1/completions"](b'{"model": "poet", "prompt": "Hi"}', context)
    loader.adapters.remove(0)
    if is_another_loaded:
        loader.adapters.add(0, ServedAdapter("poet", "other.gguf", content="cd"))
    with pytest.raises(AdapterUnloadedError) as refused:
        await KeptReply(context, replies.cache, is_kept=False).begin(reply)
    assert refused.value.http_status == 404 and not engine.submitted and loader.adapters.uses(0) == 0


async def test_a_known_request_has_the_name_of_its_adapter() -> None:
    """Checks that a request keeps its adapter's name after another adapter has taken the number."""
    adapters = ServedAdapters()
    adapters.add(0, ServedAdapter("poet", "poet.gguf", content="ab"))
    settings = replace(SETTINGS, adapters={0: "ab"})
    async with real_engine(settings) as (engine, _), client(make_app(engine, adapters=adapters)) as http:
        await http.post("/v1/completions", json={"model": "poet", "prompt": "Hi", "max_tokens": 2})
        adapters.remove(0)
        adapters.add(0, ServedAdapter("clerk", "clerk.gguf", content="cd"))
        await http.post("/v1/completions", json={"model": "clerk", "prompt": "Hi", "max_tokens": 2})
        requests = (await http.get("/cluster/requests")).json()["requests"]
    assert [[used["name"] for used in request["adapters"]] for request in requests] == [["poet"], ["clerk"]]


async def test_of_several_models_the_named_one_gets_an_adapter() -> None:
    loaders = [Loader(), Loader()]
    models, engine = [], ScriptedEngine(says("So."))
    for name, loader in zip("ab", loaders, strict=True):
        own = ApiSettings(can_unload=True, adapters=loader.adapters, adapter_folder=Path("/adapters"))
        idle = Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS)
        control = AdapterControl(loader.load, loader.unload)
        models.append(api_model(make_service(engine, name=name), idle, own, control=control))
    async with client(create_app(models)) as http:
        for body, loaded in (
            ({**BODY, "model": "b"}, [[], ["poet"]]),
            ({**BODY, "lora_name": "clerk"}, [["clerk"], ["poet"]]),
        ):
            assert (await http.post(PATH, json=body)).status_code == 200
            assert [[name for name, _ in loader.loaded] for loader in loaders] == loaded
        assert (await http.post(PATH, json={**BODY, "model": "c"})).status_code == 404
        assert (await http.post(UNLOAD, json={"lora_name": "poet", "model": "b"})).status_code == 200
    assert [loader.adapters.names for loader in loaders] == [("clerk",), ()]


@pytest.mark.parametrize("body", [{}, {"lora_name": ""}, {"lora_name": "a" * 256}, {"lora_name": 5}])
async def test_a_bad_body_unloads_nothing(body: dict[str, Any]) -> None:
    async with client(app(Loader())) as http:
        reply = await http.post(UNLOAD, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "lora_name", reply.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "a"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a b", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a", "lora_path": 5}, "lora_path"),
        ({"lora_name": "a", "lora_path": "a" * 5000}, "lora_path"),
        ({**BODY, "load_inplace": True}, "load_inplace"),
    ],
)
async def test_a_bad_body_is_refused(body: dict[str, Any], param: str) -> None:
    loader = Loader()
    async with client(app(loader)) as http:
        reply = await http.post(PATH, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text
    assert not loader.loaded


@pytest.mark.parametrize("path", [PATH, UNLOAD])
async def test_without_a_folder_it_is_off(path: str) -> None:
    async with client(app(loader := Loader(), None)) as http:
        reply = await http.post(path, json=BODY)
    assert reply.status_code == 501 and "api.adapter_folder" in reply.json()["error"]["message"]
    assert not loader.loaded


async def test_only_the_first_key_loads_and_unloads() -> None:
    async with client(app(loader := Loader(), api_keys=("admin-key", "other-key"))) as http:
        for key, status in (("other-key", 403), ("admin-key", 200)):
            reply = await http.post(PATH, json=BODY, headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == status, reply.text
        assert len(loader.loaded) == 1
        for key, status in (("other-key", 403), ("admin-key", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            reply = await http.post(UNLOAD, json={"lora_name": "poet"}, headers=headers)
            assert reply.status_code == status, reply.text
    assert loader.adapters.names == ()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (HttpError(404, "adapter_not_found", "no adapter is at 'x'", param="lora_path"), 404, "adapter_not_found"),
        (InsufficientMemoryError("12 MiB are missing"), 507, "insufficient_memory"),
    ],
)
async def test_what_fails_says_why(error: Exception, status: int, code: str) -> None:
    async with client(app(Loader(error=error))) as http:
        replies = [await http.post(PATH, json=BODY), await http.post(UNLOAD, json={"lora_name": "poet"})]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert str(error) in reply.json()["error"]["message"]


async def test_only_a_served_model_gets_adapters() -> None:
    async with client(app(loader := Loader(), strict_model=False, aliases=("cat",))) as http:
        reply = await http.post(PATH, json={**BODY, "model": "other"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert not loader.loaded
        for name in ("tiny", "cat"):
            reply = await http.post(PATH, json={**BODY, "lora_name": f"of-{name}", "model": name})
            assert reply.status_code == 200, reply.text
        for name, status in (("other", 404), ("cat", 200)):
            reply = await http.post(UNLOAD, json={"lora_name": "of-tiny", "model": name})
            assert reply.status_code == status, reply.text


def test_an_adapter_of_a_copys_name_is_not_hidden() -> None:
    names = ModelNames("tiny", settings := ApiSettings())
    names.copy("tiny", "poet")
    settings.adapters.add(0, ServedAdapter("poet", "poet.gguf", content="ab"))
    assert names.find("poet") == names.find("poet:latest") == "poet"
