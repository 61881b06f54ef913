"""Checks that responses with large tools or chats are rendered on threads, and not stored if they end meanwhile."""

from __future__ import annotations

import asyncio
import threading
from types import ModuleType
from typing import Any

import pytest

from llamaclust.cluster.front import json_text
from llamaclust.cluster.front.dialects.openai import response_store
from llamaclust.cluster.front.dialects.openai.response_store import ResponseStore, Storing
from support.clusters.served import ScriptedEngine, ended_response, events_of, says
from support.clusters.tool_chats import served

PATH = "/v1/responses"
NAMES = [f"name {number}" for number in range(3000)]
SCHEMA = {"type": "object", "properties": {"name": {"enum": NAMES}}}
TOOLS = [{"type": "function", "name": "look", "description": "", "parameters": SCHEMA, "strict": False}]


class OnLoop:
    """A record of the large values that the event loop renders or measures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.large: list[str] = []
        self._encode, self._size = json_text._encoder.encode, json_text.json_size
        monkeypatch.setattr(json_text, "_encoder", self)
        for module in (json_text, response_store):
            monkeypatch.setattr(module, "json_size", self._counted_size)

    def encode(self, value: Any) -> str:
        self._note("rendered", value)
        return self._encode(value)

    def _counted_size(self, value: Any) -> int:
        self._note("measured", value)
        return self._size(value)

    def _note(self, what: str, value: Any) -> None:
        if threading.current_thread() is threading.main_thread() and json_text.has_many_values(value):
            self.large.append(f"{what}: {str(value)[:200]}")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("background", [False, True])
async def test_large_tools(background: bool, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests large tools that are not offered to the model, so that the prompt is short."""
    engine, on_loop = ScriptedEngine(says("Yes.")), OnLoop(monkeypatch)
    body = {"input": "A", "tools": TOOLS, "tool_choice": "none", "background": background, "stream": stream}
    engine.gate.clear()
    async with served(engine) as http:
        if background and not stream:
            created = (await http.post(PATH, json=body)).json()
            assert created["tools"] == TOOLS
            for _ in range(2):
                running = (await http.get(f"{PATH}/{created['id']}")).json()
                assert (running["status"], running["tools"]) == ("in_progress", TOOLS)
            engine.gate.set()
            assert (await ended_response(http, created["id"]))["tools"] == TOOLS
        else:
            engine.gate.set()
            reply = await http.post(PATH, json=body)
            shown = events_of(reply.text)[0]["response"] if stream else reply.json()
            assert shown["tools"] == TOOLS
    assert len(engine.submitted[0].prompt) < 100 and on_loop.large == []


@pytest.mark.parametrize("background", [False, True])
async def test_a_large_chat_is_continued(background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, on_loop = ScriptedEngine(says("Yes.")), OnLoop(monkeypatch)
    monkeypatch.setattr(json_text, "_LARGE_ENTRIES", 150)
    parts = [{"type": "input_text", "text": ""}] * 80
    async with served(engine) as http:
        first = (await http.post(PATH, json={"input": [{"role": "user", "content": parts}]})).json()
        item = (await http.get(f"{PATH}/{first['id']}/input_items")).json()["data"][0]["id"]
        for more in (
            {"input": "B", "previous_response_id": first["id"]},
            {"input": [{"type": "item_reference", "id": item}, {"role": "user", "content": "B"}]},
        ):
            created = (await http.post(PATH, json={**more, "background": background})).json()
            assert (await ended_response(http, created["id"]))["status"] == "completed"
    assert on_loop.large == []


class HeldThreads:
    """Threads that block in a module's function until the test lets them go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
        self.has_come, self.may_go = threading.Event(), threading.Event()
        function = getattr(module, name)

        def held(*given: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            self.has_come.set()
            assert self.may_go.wait(60)
            return function(*given)

        monkeypatch.setattr(module, name, held)

    async def come(self) -> None:
        assert await asyncio.to_thread(self.has_come.wait, 60)


@pytest.mark.parametrize("is_deleted", [True, False])
async def test_a_response_that_is_ended_while_a_thread_renders_it_does_not_come_back(
    is_deleted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rendered, complete = ScriptedEngine(says("Yes.")), threading.Event(), Storing.complete

    def noted(storing: Storing, response: dict[str, Any]) -> None:
        complete(storing, response)
        rendered.set()

    monkeypatch.setattr(Storing, "complete", noted)
    engine.gate.clear()
    async with served(engine) as http:
        body = {"input": "A", "tools": TOOLS, "tool_choice": "none", "background": True}
        path = f"{PATH}/{(await http.post(PATH, json=body)).json()['id']}"
        rendering = HeldThreads(monkeypatch, response_store, "messages_of")
        if is_deleted:
            engine.gate.set()
            await rendering.come()
            assert (await http.delete(path)).json()["deleted"]
        else:
            storing = HeldThreads(monkeypatch, response_store, "with_ids")
            cancelling = asyncio.create_task(http.post(f"{path}/cancel"))
            await storing.come()
            engine.gate.set()
            await rendering.come()
            storing.may_go.set()
            assert (await cancelling).json()["status"] == "cancelled"
        rendering.may_go.set()
        assert await asyncio.to_thread(rendered.wait, 60)
        left = await http.get(path)
    assert left.status_code == 404 if is_deleted else left.json()["status"] == "cancelled"


async def test_a_response_that_is_deleted_before_it_is_stored_is_not_stored() -> None:
    store = ResponseStore()
    storing = store.storing("a", "resp_1", [], ())
    preparing = asyncio.create_task(storing.prepare({"id": "resp_1", "output": [""] * 2000}))
    await asyncio.sleep(0)
    assert not store.delete("a", "resp_1")
    await preparing
    with storing:
        assert store.get("a", "resp_1") is None
