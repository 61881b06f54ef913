"""Tests of messages to the coordinator whose senders were cancelled before the stream ended: only the reader reports
the end."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.wire.control import messages
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.membership import Member


@pytest.mark.parametrize("senders", [1, 2, 5])
async def test_a_stream_that_ends_after_its_senders_leaves_no_error(senders: int) -> None:
    ends, begun = asyncio.Event(), asyncio.Event()
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))

    async def write(data: object) -> None:
        begun.set()
        await ends.wait()
        raise WorkerError("the stream has ended")

    member = Member(cast("Any", SimpleNamespace()), Insecure())
    member._stream = cast("Any", SimpleNamespace(write=write))
    sent = [asyncio.create_task(member.send(messages.RenewCertificate(b"request"))) for _ in range(senders)]
    await begun.wait()
    writing = [task for task in asyncio.all_tasks() if task not in sent and task is not asyncio.current_task()]
    assert len(writing) == senders
    for task in sent:
        task.cancel()
    await asyncio.wait(sent)
    ends.set()
    await asyncio.wait(writing)
    sent.clear()
    writing.clear()
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert not unheard


async def test_a_sender_that_waits_hears_of_the_end() -> None:
    async def write(data: object) -> None:
        raise WorkerError("the stream has ended")

    member = Member(cast("Any", SimpleNamespace()), Insecure())
    member._stream = cast("Any", SimpleNamespace(write=write))
    with pytest.raises(WorkerError, match="has ended"):
        await member.send(messages.RenewCertificate(b"request"))
