"""Tests of the loss of the only worker with the model file while it sends: other workers wait for it and resume."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.coordinator import open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Event, Notice, Waiting
from llamaclust.wire.rpc.server import ServerStream
from llamaclust.wire.weight_stream import FRAME_BYTES, WeightRange, frames_of
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.static import run_static_worker
from llamaclust.worker.weights.fetch import FetchTimeouts, WeightFetch
from llamaclust.worker.weights.giver import WeightGiver
from llamaclust.worker.weights.weights import Weights
from support.clusters.command_line import eventually
from support.clusters.recovering import Answer, answer_of, generations, undisturbed
from support.clusters.static_cluster import named
from support.clusters.weight_peers import IMPATIENT
from support.models.tiny_model import build_tiny_model
from support.network.loopback import free_port

PLAN = [{"worker": "b", "layers": [0, 2]}]
REQUESTS = generations(1, 8)[:2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return build_tiny_model(path, hidden=512, ffn=1024, layers=2, context=512)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, REQUESTS)


def worker(folder: Path, join: str, name: str, model_dir: Path | None = None) -> asyncio.Task[str]:
    """Runs a worker in this process, with its own caches."""
    settings = WorkerSettings(
        name=name,
        join=join,
        token_file=None,
        listen="127.0.0.1:0",
        threads=1,
        weights_dir=folder / name,
        weights_bytes=1 << 30,
        static=True,
        model_dir=model_dir,
    )
    return asyncio.create_task(run_static_worker(settings))


def stall_after(monkeypatch: pytest.MonkeyPatch, frames: int) -> asyncio.Event:
    """Blocks the sender of weights after this many frames, and then sets the event."""
    stalled, give, left = asyncio.Event(), WeightGiver._give, frames

    async def stall(weights: WeightGiver, stream: ServerStream, wanted: WeightRange) -> None:
        nonlocal left
        if wanted.end - wanted.start <= FRAME_BYTES:
            await give(weights, stream, wanted)
            return
        for start in range(wanted.start, wanted.end, FRAME_BYTES):
            if not left:
                stalled.set()
                await asyncio.sleep(60)
            left -= 1
            data = weights._read(wanted.content, start, min(start + FRAME_BYTES, wanted.end))
            await stream.write(next(iter(frames_of(memoryview(data)))))

    monkeypatch.setattr(WeightGiver, "_give", stall)
    return stalled


def over_machines(model: Path, folder: Path, join: str) -> ClusterConfig:
    values = {
        "launcher": "static",
        "insecure": True,
        "join": {"listen": join},
        "workers": named("a", "b"),
        "plan": PLAN,
    }
    return ClusterConfig.model_validate({"model": str(model), "state_dir": folder, "context_length": 512, **values})


def places(weights: Weights, model_path: str) -> list[Path]:
    """Returns the paths at which a worker looks for the file, as if each worker were on a separate machine."""
    return [] if weights._model_dir is None else [weights._model_dir / Path(model_path).name]


async def answers(
    settings: ClusterConfig, model: Path, told: list[str], requests: tuple[GenerationRequest, ...]
) -> list[object]:
    """Returns the answers of a cluster that runs only for these requests."""

    def report(event: Event) -> None:
        if isinstance(event, Waiting):
            told.append(f"waiting for {event.text}")
        if isinstance(event, Notice):
            told.append(event.text)

    directory = ClusterDir(settings.state_dir / settings.name)
    with directory.locked():
        async with open_cluster(settings, [model], directory, report) as cluster:
            return [await answer_of(cluster.engine.submit(generation)) for generation in requests]


async def test_a_holder_that_is_back_elsewhere_is_asked_at_once(
    model: Path, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load continues, although the worker's old address does not answer."""
    timeouts = FetchTimeouts(connect_s=60.0, source_s=60.0)
    monkeypatch.setattr("llamaclust.worker.weights.remote_file.WeightFetch", partial(WeightFetch, timeouts=timeouts))
    join, told = f"127.0.0.1:{free_port()}", list[str]()
    monkeypatch.setattr(Weights, "places", places)
    async with asyncio.timeout(100):
        with monkeypatch.context() as patched:
            stalled = stall_after(patched, 3)
            answering = asyncio.create_task(answers(over_machines(model, tmp_path, join), model, told, REQUESTS))
            first = worker(tmp_path, join, "a", model.parent)
            other = worker(tmp_path, join, "b")
            await stalled.wait()
            first.cancel()
            await asyncio.to_thread(eventually, lambda: "worker a is lost" in " ".join(told), 10, "the loss")
        second = worker(tmp_path, join, "a", model.parent)
        assert await answering == expected
        await asyncio.gather(first, second, other, return_exceptions=True)
    assert not [text for text in told if "waiting for a worker" in text], "the load did not fail"


async def test_the_holder_is_lost_while_it_sends(
    model: Path,
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    timeouts = replace(IMPATIENT, source_s=4.0)  # worker a's loss is detected before worker b's load fails
    monkeypatch.setattr("llamaclust.worker.weights.remote_file.WeightFetch", partial(WeightFetch, timeouts=timeouts))
    join, told = f"127.0.0.1:{free_port()}", list[str]()
    monkeypatch.setattr(Weights, "places", places)
    async with asyncio.timeout(100):
        with monkeypatch.context() as patched:
            stalled = stall_after(patched, 3)
            answering = asyncio.create_task(answers(over_machines(model, tmp_path, join), model, told, REQUESTS))
            first = worker(tmp_path, join, "a", model.parent)
            other = worker(tmp_path, join, "b")
            await stalled.wait()
            first.cancel()
            await asyncio.to_thread(eventually, lambda: "waiting for a worker" in " ".join(told), 60, "the wait")
        second = worker(tmp_path, join, "a", model.parent)
        assert await answering == expected
        await asyncio.gather(first, second, other, return_exceptions=True)
    print("\n".join(told))
    assert "trying again for 4 s" in caplog.text and "no more weights from worker a" in caplog.text
    waiting = [text for text in told if "waiting for a worker" in text]
    assert "are not available (worker a: " in waiting[0]
