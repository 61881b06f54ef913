"""Tests requests to workers: each reply reaches its request, and errors have few classes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import (
    find_weights,
    log_tail,
    probe,
    profile_link,
    profile_worker,
)
from llamaclust.core.errors import (
    DeadlineError,
    InsufficientMemoryError,
    LlamaclustError,
    LoadCancelledError,
    ProtocolError,
    UsageError,
    WorkerError,
)
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.wire.control.kv_disk import KvDone
from llamaclust.wire.control.logs import LogTail
from llamaclust.wire.control.messages import Failure, ProbeResult, RequestFailed, WorkerMessage
from llamaclust.wire.control.profiles import LinkProfile, LinkProfiles, ProfileWorker, WorkerProfile
from llamaclust.wire.control.weights import FindWeights, WeightsFound
from support.wire.control_messages import REGISTER
from support.wire.worker_handles import handle_of

RequestCall = Callable[[WorkerHandle, float], Awaitable[object]]
_PASSES_S, _LASTS_S = 0.05, 60.0


OTHER = SimpleNamespace(name="b", registration=replace(REGISTER, name="b"))
REQUESTS: dict[str, tuple[RequestCall, WorkerMessage, WorkerMessage, object]] = {
    "machine": (
        lambda worker, limit_s: profile_worker(worker, ProfileWorker(), deadline_s=limit_s),
        WorkerProfile(Profile(DeviceProfile(1.0, 1.0)), request_id=1),
        WorkerProfile(Profile(DeviceProfile(2.0, 2.0)), request_id=2),
        Profile(DeviceProfile(2.0, 2.0)),
    ),
    "link": (
        lambda worker, limit_s: profile_link(worker, OTHER, deadline_s=limit_s),  # type: ignore[arg-type]
        LinkProfiles((LinkProfile(1.0, 1.0),), 1),
        LinkProfiles((LinkProfile(2.0, 2.0),), 2),
        LinkProfile(2.0, 2.0),
    ),
    "way": (
        lambda worker, limit_s: probe(worker, OTHER, limit_s),  # type: ignore[arg-type]
        ProbeResult("b", "no answer", 1),
        ProbeResult("b", "", 2),
        "",
    ),
    "weights": (
        lambda worker, limit_s: find_weights(worker, FindWeights("/m", "id", False), progress_timeout_s=limit_s),
        WeightsFound(True, request_id=1),
        WeightsFound(False, request_id=2),
        WeightsFound(False, request_id=2),
    ),
    "log": (
        lambda worker, limit_s: log_tail(worker, limit_s),
        LogTail(("old",), 0, 1),
        LogTail(("new",), 1, 2),
        LogTail(("new",), 1, 2),
    ),
}


@pytest.mark.parametrize("what", REQUESTS)
async def test_an_answer_after_its_deadline_is_not_taken_for_the_next_ones(what: str) -> None:
    send, late, right, expected = REQUESTS[what]
    worker = handle_of()
    with pytest.raises(DeadlineError):
        await send(worker, _PASSES_S)
    worker.channel.end_silence()
    asking = asyncio.ensure_future(send(worker, _LASTS_S))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    worker.receive(late)
    worker.receive(right)
    assert await asking == expected


@pytest.mark.parametrize("what", REQUESTS)
async def test_an_answer_to_another_kind_of_request_breaks_the_protocol(what: str) -> None:
    """The waiting code would read fields that the answer lacks, which would end the cluster in the control loop."""
    send, right, _, _ = REQUESTS[what]
    others = [answer for name, (_, answer, _, _) in REQUESTS.items() if name != what]
    for wrong in (*others, KvDone(0, 1)):
        worker = handle_of()
        asking = asyncio.ensure_future(send(worker, _LASTS_S))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(
            ProtocolError, match=f"request 1: expected {type(right).__name__}, found {type(wrong).__name__}"
        ):
            worker.receive(wrong)
        await asyncio.sleep(0)
        assert not asking.done()
        asking.cancel()


@pytest.mark.parametrize("what", ["machine", "link"])
async def test_failures_answer_their_own_request(what: str) -> None:
    worker = handle_of()
    asking = asyncio.ensure_future(REQUESTS[what][0](worker, _LASTS_S))
    await asyncio.sleep(0)
    worker.receive(RequestFailed(Failure("WorkerError", "late"), 99))
    worker.receive(RequestFailed(Failure("UsageError", "no"), 1))
    with pytest.raises(UsageError, match="worker a: no"):
        await asking


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("InsufficientMemoryError", InsufficientMemoryError),
        ("LoadCancelledError", LoadCancelledError),
        ("LlamaclustError", LlamaclustError),
        ("ParameterError", WorkerError),  # its constructor takes more than a text
        ("StalledError", WorkerError),  # the coordinator's own: it causes an expulsion
        ("__name__", WorkerError),
        ("", WorkerError),
    ],
)
async def test_a_worker_chooses_among_few_classes_of_errors(kind: str, error: type[LlamaclustError]) -> None:
    worker = handle_of()
    asking = asyncio.ensure_future(REQUESTS["machine"][0](worker, _LASTS_S))
    await asyncio.sleep(0)
    worker.receive(RequestFailed(Failure(kind, "no"), 1))
    with pytest.raises(LlamaclustError, match="worker a: no") as raised:
        await asking
    assert type(raised.value) is error
