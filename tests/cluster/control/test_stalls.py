"""Tests of workers whose loads make no progress: they are lost after `timeouts.load`, and the tokens stay the same."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Awaitable, Callable
from itertools import cycle
from pathlib import Path

import pytest

from llamaclust.cluster.control.failures import quarantine
from llamaclust.cluster.membership.worker_channel import ProgressDeadline
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import find_weights
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import StalledError
from llamaclust.wire.control.messages import CoordinatorMessage, Loaded, LoadProgress, WorkerMessage
from llamaclust.wire.control.weights import FindWeights, FindWeightsProgress, WeightsFound
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security.credentials import Insecure
from support.clusters.recovering import config, generations, recovering, undisturbed
from support.event_loop import pass_time
from support.seed import SEED
from support.wire.control_messages import LOAD, REGISTER

PROGRESS_TIMEOUT_S = 600.0


def hang_once(monkeypatch: pytest.MonkeyPatch, victims: set[str]) -> None:
    """Makes the next load of each of these workers hang, although it goes on to report progress."""
    hear = WorkerHandle.receive
    telling = set()

    async def tell(handle: WorkerHandle, epoch: int) -> None:
        for done in cycle((1 << 20, 0)):  # alternating values are no progress
            if handle.loss is not None:
                return
            hear(handle, LoadProgress(epoch, done, 2 << 20))
            await asyncio.sleep(0.05)

    def deaf(handle: WorkerHandle, message: WorkerMessage) -> None:
        if isinstance(message, Loaded) and handle.name in victims:
            victims.discard(handle.name)
            telling.add(asyncio.create_task(tell(handle, message.epoch)))
        else:
            hear(handle, message)

    monkeypatch.setattr(WorkerHandle, "receive", deaf)


async def test_loads_that_hang_and_workers_that_stop_while_they_load_change_no_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {SEED}")
    monkeypatch.setattr(quarantine, "_BACKOFF", Backoff(first_s=1.0, max_s=600.0))
    requests = generations(SEED, 60)
    expected = await asyncio.to_thread(undisturbed, model, requests)
    victims = {"c"}
    hang_once(monkeypatch, victims)
    async with recovering(config(model, tmp_path, timeouts={"worker": "10s", "load": "2500ms"})) as run:
        assert not victims  # lost in the load of the first epoch
        said = (
            r"is lost: it hangs: worker c made no progress with layers \[4, 6\) for 2\.5 s "
            r"\(timeouts.load\): \d of \d MiB"
        )
        assert re.search(said, run.told[0]), run.told[0]

        def stop_another(text: str) -> None:
            if text.startswith("new plan") and not stopped:
                stopped.append("b")
                run.hurt("b", signal.SIGSTOP)

        stopped: list[str] = []
        for on_event in (lambda text: None, stop_another):
            await run.whole()
            victims.add("c")  # lost in a recovery, too
            tasks, before = run.start(requests), run.tokens
            await run.token(before + 40)
            run.hurt("a")
            run.on_event = on_event
            assert await asyncio.gather(*tasks) == expected
            assert not victims
            hangs = sum("it hangs: worker c" in text for text in run.told)
            assert hangs in (2, 2 + len(stopped)), "b's loss cancels its load, unless that stalls before"
        assert stopped
        await run.whole()
        reasons = ("no heartbeat for 10 s", "it hangs: worker b")  # Either limit may be exceeded first.
        assert any("worker b " in text and any(reason in text for reason in reasons) for text in run.told)


Asked = Callable[[WorkerHandle], Awaitable[object]]


async def _answered(send: Asked, messages: list[WorkerMessage], monkeypatch: pytest.MonkeyPatch) -> object:
    """Returns the outcome for a worker that sends these messages, one in each half of the progress timeout."""
    said: list[CoordinatorMessage] = []

    async def say(message: CoordinatorMessage) -> None:
        said.append(message)

    handle = WorkerHandle(REGISTER, say, lambda: "", Insecure())
    asking = asyncio.ensure_future(send(handle))
    for message in messages:
        await asyncio.sleep(0)
        pass_time(monkeypatch, PROGRESS_TIMEOUT_S / 2)
        await asyncio.sleep(0)
        handle.receive(message)
    return await asking


async def _load(handle: WorkerHandle) -> object:
    return await handle.load(LOAD, progress_timeout_s=PROGRESS_TIMEOUT_S)


async def _locate(handle: WorkerHandle) -> object:
    return await find_weights(handle, FindWeights("/m.gguf", "id", True), None, PROGRESS_TIMEOUT_S)


async def test_what_gets_further_is_waited_for_and_what_does_not_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    mib, epoch = 1 << 20, LOAD.epoch
    loaded, located = Loaded(epoch, 1, 2, 3), WeightsFound(True, "ab" * 32, 7, request_id=1)
    loads = [LoadProgress(epoch, done * mib, 8 * mib) for done in range(6)]
    reads = [FindWeightsProgress(done * mib, 8 * mib) for done in range(6)]
    assert await _answered(_load, [*loads, loaded], monkeypatch) == loaded
    assert await _answered(_locate, [*reads, located], monkeypatch) == located
    layers = re.escape(f"layers [{LOAD.start}, {LOAD.end})")
    limit = r"for 600 s \(timeouts.load\)"
    with pytest.raises(StalledError, match=rf"made no progress with {layers} {limit}: 3 of 8 MiB"):
        await _answered(_load, [loads[3]] * 5, monkeypatch)
    with pytest.raises(StalledError, match=rf"made no progress with reading /m.gguf {limit}: 2 of 8 MiB"):
        await _answered(_locate, [reads[2]] * 5, monkeypatch)


async def test_progress_after_the_deadline_is_ignored() -> None:
    async def request(limit: deadline) -> None:
        async with limit:
            await asyncio.Event().wait()

    progress = ProgressDeadline("worker a made no progress", 0.02)
    with pytest.raises(StalledError, match=r"worker a made no progress for 0\.02 s"):
        await progress.wait(request)
    progress.report(1 << 20, 2 << 20)
