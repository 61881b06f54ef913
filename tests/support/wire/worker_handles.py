"""Handles of workers without a process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.wire.control.messages import CoordinatorMessage
from llamaclust.wire.security.credentials import Insecure
from support.wire.control_messages import REGISTER


async def _nothing(message: CoordinatorMessage) -> None: ...


def handle_of(name: str = "a", say: Callable[[CoordinatorMessage], Awaitable[None]] = _nothing) -> WorkerHandle:
    return WorkerHandle(replace(REGISTER, name=name), say, lambda: "", Insecure())
