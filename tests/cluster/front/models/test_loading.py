"""Tests of requests that load and unload models."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from llamaclust.cluster.front import body
from llamaclust.cluster.front.dialects.openai import models as models_module
from llamaclust.cluster.front.dialects.openai.models import ModelEndpoints
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.models import ModelRouter
from llamaclust.core.errors import DeadlineError, ParameterError
from support.several_models.api_models import ScriptedLifecycle, named_model


def endpoints(lifecycle: ScriptedLifecycle) -> ModelEndpoints:
    return ModelEndpoints(ModelRouter([named_model("a", lifecycle)]))


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
    lifecycle = ScriptedLifecycle()
    await getattr(endpoints(lifecycle), call)(request(model="a", more=[0.5] * 100_000))
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    assert lifecycle.is_asleep is (call == "unload")


async def test_a_model_with_requests_is_not_unloaded() -> None:
    lifecycle = ScriptedLifecycle()
    lifecycle.enter()
    with pytest.raises(HttpError, match="'a' has requests and stays loaded") as refused:
        await endpoints(lifecycle).unload(request(model="a"))
    assert refused.value.http_status == 409 and not lifecycle.is_asleep
    lifecycle.leave()
    assert (await endpoints(lifecycle).unload(request(model="a"))).status_code == 200 and lifecycle.is_asleep


async def test_an_unload_does_not_wait_for_a_load_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading(ScriptedLifecycle):
        async def sleep(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(models_module, "_UNLOAD_S", 0.01)
    with pytest.raises(DeadlineError, match="unloading 'a', which is still being loaded, took longer than"):
        await endpoints(Loading()).unload(request(model="a"))


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": [1]}, {"model": 1}])
@pytest.mark.parametrize("call", ["load", "unload"])
async def test_a_model_must_be_named(call: str, fields: dict[str, Any]) -> None:
    lifecycle = ScriptedLifecycle()
    with pytest.raises(ParameterError, match=r"model: (is missing|must be a string)"):
        await getattr(endpoints(lifecycle), call)(request(**fields))
    assert not lifecycle.is_asleep
