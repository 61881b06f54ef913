"""Tests of requests that are refused while their body arrives."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message

from llamaclust.cluster.front.http.gates import Admission, AdmissionGate
from llamaclust.cluster.front.settings import ApiSettings

SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "headers": [(b"content-length", b"99")],
    "app": Starlette(),
}


async def test_a_refused_request_may_use_timeouts_while_its_error_is_sent() -> None:
    """The task is not cancelled any more: otherwise Python 3.11.2 would raise CancelledError instead of
    TimeoutError."""
    admission = Admission(ApiSettings())
    sent, outstanding, is_waiting = list[Message](), list[int](), asyncio.Event()

    async def receive() -> Message:
        is_waiting.set()
        return await asyncio.Future()

    async def read(scope: object, receive: Any, send: Any) -> None:
        await receive()

    async def send(message: Message) -> None:
        task = asyncio.current_task()
        assert task is not None
        outstanding.append(task.cancelling())
        sent.append(message)

    asking = asyncio.create_task(AdmissionGate(read, admission)(SCOPE, receive, send))
    await is_waiting.wait()
    admission.stop()
    admission.end()  # A second signal comes at once.
    await asking
    assert sent[0]["status"] == 503 and b"cluster_stopping" in sent[1]["body"]
    assert outstanding == [0, 0]
