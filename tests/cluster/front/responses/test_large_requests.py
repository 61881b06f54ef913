"""Responses with large tools or chats: the event loop neither renders nor measures them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llamaclust.cluster.front import json_text
from llamaclust.cluster.front.dialects.openai import response_store
from support.clusters.served import ScriptedEngine, ended_response, events_of, says
from support.clusters.tool_chats import served

PATH = "/v1/responses"
NAMES = [f"name {number}" for number in range(3000)]
SCHEMA = {"type": "object", "properties": {"name": {"enum": NAMES}}}
TOOLS = [{"type": "function", "name": "look", "description": "", "parameters": SCHEMA, "strict": False}]


class OnLoop:
    """The values that the event loop renders or measures, if they are large."""

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
    """The model is offered none of them, so that its prompt is short."""
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
