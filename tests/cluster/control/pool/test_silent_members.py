"""Tests that a start asks a worker that has missed a deadline no more questions, and that it loads without it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.epochs import StageLoadError, load_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.resources import link_profiling
from llamaclust.cluster.control.resources.link_profiling import measure_links
from llamaclust.cluster.control.resources.profiling import WorkerProfiles
from llamaclust.cluster.control.weight_sources import ModelReference, WantedBytes
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership import worker_requests
from llamaclust.cluster.membership.worker_channel import SilentError
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import find_weights, profile_worker
from llamaclust.core.errors import DeadlineError, StalledError
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.wire.control.logs import LogTail
from llamaclust.wire.control.messages import CoordinatorMessage, Heartbeat, Load, Loaded, Register, WorkerMessage
from llamaclust.wire.control.profiles import LinkProfile, LinkProfiles, ProfileLinks, ProfileWorker, WorkerProfile
from llamaclust.wire.control.weights import AdapterFile, EncoderFile, FindWeights, FindWeightsProgress, WeightsFound
from llamaclust.wire.security.credentials import Insecure
from support.clusters.command_line import CommandLine
from support.clusters.faults.worker_program import run_in_workers
from support.clusters.real_cluster import LIMITS
from support.clusters.static_cluster import join_port, named, ready, start_coordinator, start_worker
from support.models.tiny_model import build_tiny_model
from support.wire.control_messages import REGISTER

LIMIT_S = 0.05
LOAD_S = 2.0
FAST = LinkProfile(1e-4, 1e9)
HEARTBEAT = Heartbeat(0.0, 0, 0, 0, 0)
DIGEST = "ab" * 32
Say = Callable[[CoordinatorMessage], WorkerMessage | None]


def answer(message: CoordinatorMessage) -> WorkerMessage | None:
    match message:
        case ProfileWorker(request_id=request_id):
            return WorkerProfile(Profile(DeviceProfile(10e9, 100e9)), request_id)
        case ProfileLinks(_, request_id):
            return LinkProfiles((FAST,), request_id)
        case FindWeights(request_id=request_id):
            return WeightsFound(True, DIGEST, 10, request_id, gives=True, file=DIGEST)
        case Load(epoch):
            return Loaded(epoch, 1, 1, 1)
    raise AssertionError(message)


def nothing(message: CoordinatorMessage) -> WorkerMessage | None:
    return None


def only(*kinds: type[CoordinatorMessage]) -> Say:
    return lambda message: answer(message) if isinstance(message, kinds) else None


def heartbeats(message: CoordinatorMessage) -> WorkerMessage | None:
    return HEARTBEAT


def equal_progress(message: CoordinatorMessage) -> WorkerMessage | None:
    return FindWeightsProgress(1, 2) if isinstance(message, FindWeights) else None


def foreign_answers(message: CoordinatorMessage) -> WorkerMessage | None:
    """Answers a question that nobody has asked."""
    return LogTail((), 0, 10**6) if isinstance(message, FindWeights | ProfileWorker | ProfileLinks) else None


def measured_then_mute(message: CoordinatorMessage) -> WorkerMessage | None:
    return None if isinstance(message, FindWeights) else answer(message)


MUTES: Mapping[str, Say] = {
    "nothing": nothing,
    "heartbeats": heartbeats,
    "its speed alone": only(ProfileWorker),
    "its speed and links": only(ProfileWorker, ProfileLinks),
    "weights alone": only(FindWeights),
    "equal progress": equal_progress,
    "foreign answers": foreign_answers,
    "all but weights": measured_then_mute,
}


def _named(name: str) -> dict[str, str]:
    return {"name": name}


def _registered(name: str) -> Register:
    return replace(REGISTER, name=name, machine=name, host=name, fingerprint=f"chip of {name}", address=f"unix:/{name}")


@dataclass
class Start:
    """Simulated workers a, b and m; m is mute in some way. `late` counts questions after a missed deadline."""

    mute: Say
    asked: list[tuple[str, str]] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    missed: int = 0

    def __post_init__(self) -> None:
        self.workers = {
            name: WorkerHandle(self._registered(name), self._sayer(name), str, Insecure()) for name in "abm"
        }
        self.told: list[Any] = []

    def _registered(self, name: str) -> Any:
        return replace(
            REGISTER, name=name, machine=name, host=name, fingerprint=f"chip of {name}", address=f"unix:/{name}"
        )

    def _sayer(self, name: str) -> Callable[[CoordinatorMessage], Awaitable[None]]:
        async def say(message: CoordinatorMessage) -> None:
            self.asked.append((name, type(message).__name__))
            if name == "m" and self.workers["m"].channel.is_silent:
                self.late.append(type(message).__name__)
            if (said := (self.mute if name == "m" else answer)(message)) is not None:
                self.workers[name].receive(said)

        return say

    async def run(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asks what a start asks, in its order: speeds of two models, links, weights, adapters and an encoder."""
        monkeypatch.setattr(link_profiling, "_from_here", self._from_here)
        monkeypatch.setattr(worker_requests.profile_link, "__defaults__", (LIMIT_S,))
        for digest in ("ab", "cd"):
            await self.profiles(folder, digest * 32).measure(self.workers, self.workers)
        await measure_links(self.workers, Insecure(), folder, self.told.append)
        path = "/m.gguf"
        adapter = FindWeights(path, DIGEST, adapter=AdapterFile(1, "/a.gguf", DIGEST))
        encoder = FindWeights(path, DIGEST, encoder=EncoderFile("/e.gguf", DIGEST))
        self.loads = StageLoads(
            1,
            [StageInfo("a", 0, 1), StageInfo("b", 1, 2, encoder_bytes=1)],
            ModelReference(path, DIGEST),
            LIMITS,
            progress_timeout_s=LIMIT_S,
            adapters={1: WantedBytes(adapter, progress_timeout_s=LIMIT_S)},
            encoder=WantedBytes(encoder, progress_timeout_s=LIMIT_S),
        )
        await load_stages(self.loads, self.workers)

    def profiles(self, folder: Path, model_id: str) -> WorkerProfiles:
        values = {"model": "m.gguf", "workers": [*map(_named, "abm")], "state_dir": folder, "launcher": "static"}
        model: Any = SimpleNamespace(model_id=model_id, plain=SimpleNamespace(path=Path("/m.gguf")), quant_types=())
        model.widened = model
        profiles = WorkerProfiles(ClusterConfig.model_validate(values), model, folder, self.told.append)
        profiles._limit_s = LIMIT_S  # a cluster file has at least one second
        return profiles

    async def _from_here(self, worker: WorkerHandle, _: object) -> LinkProfile:
        self.asked.append((worker.name, "echo"))
        if worker.name == "m":
            self.late += ["echo"] * worker.channel.is_silent
            if self.mute not in (answer, MUTES["its speed and links"], measured_then_mute):
                raise DeadlineError(f"measuring the link to {worker.name} took longer than 20 s")
        return FAST


@pytest.mark.parametrize("mute", MUTES)
async def test_a_start_asks_a_silent_worker_nothing_more(
    mute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Start(MUTES[mute])
    async with asyncio.timeout(60):
        await start.run(tmp_path, monkeypatch)
    assert start.late == [], start.asked
    assert start.workers["m"].channel.is_silent, "the worker has missed a deadline"
    assert all(1 in start.workers[name].stages for name in "ab")


async def test_a_worker_that_is_mute_during_its_load_s_questions_is_named_and_not_ordered_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Start(answer)
    await start.run(tmp_path, monkeypatch)
    start.mute = nothing
    start.workers["m"].forget_files()
    loads = replace(start.loads, epoch=2, stages=[StageInfo("a", 0, 1), StageInfo("m", 1, 2)], encoder=None)
    loads = replace(loads, model=ModelReference("/other.gguf", "cd" * 32))
    asked = len(start.asked)
    with pytest.raises(StageLoadError, match=r"worker m did not say within 0\.05 s \(timeouts\.load\) which") as caught:
        await load_stages(loads, start.workers)
    (suspect,) = caught.value.suspects
    assert suspect.name == "m" and isinstance(suspect.error, StalledError)
    assert [kind for name, kind in start.asked[asked:] if name == "m"] == ["FindWeights"]
    assert "Load" not in [kind for _, kind in start.asked[asked:]]


async def test_a_late_answer_or_ten_minutes_end_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Start(nothing)
    worker, request = start.workers["m"], FindWeights("/m.gguf", DIGEST)
    with pytest.raises(DeadlineError, match=r"measurement took longer than 0\.01 s"):
        await profile_worker(worker, ProfileWorker(), 0.01)
    with pytest.raises(SilentError, match=r"it is not asked.* measurement took longer"):
        await find_weights(worker, request)
    worker.receive(WorkerProfile(Profile(DeviceProfile(1e9, 1e9)), 1))
    assert not worker.channel.is_silent
    with pytest.raises(StalledError):
        await find_weights(worker, request, None, 0.01)
    assert worker.channel.is_silent
    loop = asyncio.get_running_loop()
    later_s = loop.time() + 601
    monkeypatch.setattr(loop, "time", lambda: later_s)
    assert not worker.channel.is_silent


_MUTE = """
from llamaclust.worker.membership import Member

def ignores(member, message, *_):
    print("ignored", type(message).__name__, file=sys.stderr, flush=True)

Member._dispatch = ignores
"""


@pytest.mark.parametrize("is_stated", [True, False], ids=["speed in the cluster file", "speed to measure"])
def test_a_cluster_serves_without_a_worker_that_answers_nothing_but_heartbeats(
    is_stated: bool, line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_workers(monkeypatch, tmp_path, _MUTE, "m")
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=3, context=256)
    workers = [*named("a", "b"), *(named("m") if is_stated else [{"name": "m"}])]
    coordinator = start_coordinator(line, model, workers=workers, timeouts={"load": LOAD_S})
    port, begun_s = join_port(coordinator), monotonic()
    mute = [start_worker(line, port, name) for name in "abm"][-1]
    with ready(coordinator, line) as cluster:
        print(f"timeouts.load {LOAD_S:g} s: ready after {monotonic() - begun_s:.1f} s")
        assert len(cluster.answer()[0]) == 12
    ignored = re.findall(r"ignored (\w+)", mute.err.read_text())
    assert "Load" not in ignored, coordinator.err.read_text()
    assert is_stated or ignored == ["ProfileWorker"], coordinator.err.read_text()
