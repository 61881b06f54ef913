"""Tests of restored slots: requests that use their KV memory have the ids and bits of undisturbed ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.slots import Slots
from llamaclust.cluster.launchers.in_process import LocalSettings
from support.clusters.served import client
from support.models.tiny_model import build_tiny_model
from support.several_models.api_models import api_model

PROMPT = [3 + 7 * place % 300 for place in range(90)]
FIRST: dict[str, Any] = {"prompt": PROMPT, "n_predict": 40, "ignore_eos": True, "seed": 5, "return_tokens": True}


@asynccontextmanager
async def serving(model: Path, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Serves a model with its own KV memory, like a separate process."""
    local = LocalClient(model, threads=1, settings=LocalSettings(context_length=256))
    async with local._stage.serve() as service:
        service.slots = Slots(service._engine, 2)
        async with client(create_app([api_model(service, service._engine, ApiSettings(slot_folder=folder))])) as http:
            yield http


async def complete(http: httpx.AsyncClient, **fields: Any) -> Any:
    reply = await http.post("/completion", json=FIRST | {"n_probs": 3} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_turns_after_a_restored_slot_are_equal(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny.gguf", hidden=64, heads=4, ffn=96, context=256)
    async with serving(model, tmp_path) as http:
        first = await complete(http, id_slot=1)
        saved = (await http.post("/slots/1?action=save", json={"filename": "slot"})).json()
        turn = {"prompt": [*PROMPT, *first["tokens"], 9, 8, 7], "seed": 6}
        second = await complete(http, **turn)
    async with serving(model, tmp_path) as http:
        restored = (await http.post("/slots/0?action=restore", json={"filename": "slot"})).json()
        then, again = await complete(http, **turn), await complete(http)  # Uses the answer's tokens, then the prompt's.
    assert saved["n_saved"] == restored["n_restored"] == len(PROMPT) + len(first["tokens"]) - 1
    assert again["timings"]["cache_n"] == 80 and then["timings"]["cache_n"] == second["timings"]["cache_n"] == 128
    for name in ("tokens", "completion_probabilities"):
        assert again[name] == first[name] and then[name] == second[name]
