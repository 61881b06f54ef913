"""Models are loaded and unloaded by requests."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from llamaclust.cluster.api import body
from llamaclust.cluster.api.models.door import ModelDoor
from llamaclust.cluster.api.models.lists import ModelLists
from llamaclust.cluster.api.settings import ApiSettings
from support.several_models.door_models import ScriptedResident, door_model

SETTINGS = ApiSettings()


def lists_of(resident: ScriptedResident) -> ModelLists:
    return ModelLists([], ModelDoor([door_model("a", Response(), resident)], SETTINGS), SETTINGS)


def request(**fields: Any) -> Request:
    message = {"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}

    async def receive() -> Message:
        return message

    return Request({"type": "http", "method": "POST", "path": "/v1/models/load", "headers": []}, receive)


@pytest.mark.parametrize("call", ["load", "unload"])
async def test_large_bodies_are_parsed_on_a_thread(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def parse(data: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return {"model": "a"}

    monkeypatch.setattr(body, "parse_object", parse)
    resident = ScriptedResident()
    await getattr(lists_of(resident), call)(request(model="a", more=[0.5] * 100_000))
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    assert resident.is_asleep is (call == "unload")
