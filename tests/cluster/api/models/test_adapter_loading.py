"""vLLM's endpoint that loads an adapter: who may use it, what it passes on, how it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.operations.controls import Controls
from llamaclust.cluster.state.adapters import ServedAdapter, ServedAdapters
from llamaclust.core.errors import InsufficientMemoryError
from support.clusters.served import ScriptedEngine, client, make_app, says

PATH = "/v1/load_lora_adapter"
BODY = {"lora_name": "poet", "lora_path": "poet.gguf"}


@dataclass
class Loader:
    """What the endpoint controls."""

    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    error: Exception | None = None
    loaded: list[tuple[str, str]] = field(default_factory=list)

    async def load(self, name: str, path: str) -> None:
        if self.error is not None:
            raise self.error
        self.loaded.append((name, path))
        self.adapters.add(len(self.adapters.numbers), ServedAdapter(name, path, content="ab"))


def app(loader: Loader, folder: Path | None = Path("/adapters"), **settings: Any) -> Any:
    controls = Controls(adapters=loader)
    return make_app(
        ScriptedEngine(says("So.")), controls=controls, adapters=loader.adapters, adapter_folder=folder, **settings
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


async def test_without_a_folder_it_is_off() -> None:
    async with client(app(loader := Loader(), None)) as http:
        reply = await http.post(PATH, json=BODY)
    assert reply.status_code == 501 and "api.adapter_folder" in reply.json()["error"]["message"]
    assert not loader.loaded


async def test_only_the_first_key_loads() -> None:
    async with client(app(loader := Loader(), api_keys=("admin-key", "other-key"))) as http:
        for key, status in (("other-key", 403), ("admin-key", 200)):
            reply = await http.post(PATH, json=BODY, headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == status, reply.text
    assert len(loader.loaded) == 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (HttpError(404, "adapter_not_found", "no adapter is at 'x'", param="lora_path"), 404, "adapter_not_found"),
        (InsufficientMemoryError("12 MiB are missing"), 507, "insufficient_memory"),
    ],
)
async def test_a_load_that_fails_says_why(error: Exception, status: int, code: str) -> None:
    async with client(app(Loader(error=error))) as http:
        reply = await http.post(PATH, json=BODY)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert str(error) in reply.json()["error"]["message"]
