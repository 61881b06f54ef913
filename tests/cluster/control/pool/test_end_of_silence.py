"""Tests that models are planned again when a worker that answered nothing can be used again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.pool.membership_watch import MembershipWatch
from llamaclust.cluster.membership.members import HeartbeatReceived
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DeadlineError
from support.wire.worker_handles import handle_of


def after_ten_minutes(worker: WorkerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    later_s = loop.time() + 601
    monkeypatch.setattr(loop, "time", lambda: later_s)


def by_an_answer(worker: WorkerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.channel.end_silence()


@pytest.mark.parametrize("end", [after_ten_minutes, by_an_answer])
@pytest.mark.parametrize("models", [1, 2, 3])
async def test_each_model_is_planned_again_once_when_a_silence_ends(
    end: Any, models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[object] = []
    store = SimpleNamespace(post=posted.append, state=SimpleNamespace(is_short=False))
    runner: Any = SimpleNamespace(engine=None, store=store)
    nothing: Any = None
    watch = MembershipWatch(nothing, nothing, [runner] * models, nothing, nothing, nothing, nothing)
    silent, other = handle_of("a"), handle_of("b")

    def beat() -> None:
        for worker in (silent, other):
            watch._changed(HeartbeatReceived(worker))

    beat()
    silent.channel.miss(DeadlineError("the measurement took longer than 5 s"))
    for _ in range(3):
        beat()
    assert not posted, "it is silent"
    end(silent, monkeypatch)
    for _ in range(3):
        beat()
    assert posted == [observations.Signal.LINKS_CHANGED] * models
