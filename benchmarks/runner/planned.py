"""Starts clusters without earlier measurements, and compares their plans' predictions with measured times."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import AwaitingWorkers, Event, Report
from runner.case import Measures
from support.network.box import Box
from support.network.link import Link
from support.network.namespaces import entered

_COORDINATOR = "coordinator"
_END_S = 10.0
PROMPT, TOKENS = 224, 48
"""Numbers of tokens of prompt and answer. Attention then reads as many keys as in a worker's own measurement."""
NEAR = "0.85 .. 1.15"

Times = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers named a, b, and so on, with their threads and memory. With links, each worker runs on its own host."""

    name: str
    what: str
    threads: tuple[int, ...]
    memory_mib: tuple[int, ...] = ()
    links: tuple[Link, ...] = ()  # Links of the workers' hosts. The coordinator's host has no delay.
    objective: str = "latency"
    is_small: bool = False

    @property
    def workers(self) -> dict[str, tuple[int, int | None]]:
        memory = self.memory_mib or (None,) * len(self.threads)
        return {chr(97 + index): both for index, both in enumerate(zip(self.threads, memory, strict=True))}


def at(round_trip_ms: float, rate_mbit: int | None = None) -> Link:
    """Makes a host's link, which delays what the host sends by half of the round trip. Delays of two hosts add up."""
    return Link(round_trip_ms / 2e3, None if rate_mbit is None else rate_mbit * 10**6)


@contextmanager
def network(shape: Shape) -> Iterator[Box | None]:
    if not shape.links:
        yield None
        return
    with Box([_COORDINATOR, *shape.workers], delays=True) as box:
        for name, link in zip(shape.workers, shape.links, strict=True):
            box.set_link(link, name)
        with entered(box[_COORDINATOR].namespace):
            yield box


@asynccontextmanager
async def opened(shape: Shape, model: Path, box: Box | None, context_length: int = 512) -> AsyncIterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as hosts:
        directory = ClusterDir(Path(folder) / shape.name)
        directory.create()
        keys = [f"model={model}", f"context_length={context_length}", "max_sequences=8", f"objective={shape.objective}"]
        keys.append(f"state_dir={folder}")
        report: Report = lambda event: None  # noqa: E731
        if box is None:
            keys.append(f"workers=[{', '.join(_worker(name, *own) for name, own in shape.workers.items())}]")
        else:
            here = box[_COORDINATOR].address
            keys += ["launcher=static", f"join={{listen: {here}:7100, members: {here}:7101}}"]
            keys.append(f"workers=[{', '.join(f'{{name: {name}}}' for name in shape.workers)}]")
            report = _starter(shape, box, directory.path.parent / ".trust" / "token", hosts)
        async with open_cluster(load_config(None, keys), [model], directory, report) as cluster:
            yield cluster


def _worker(name: str, threads: int, memory_mib: int | None) -> str:
    memory = "" if memory_mib is None else f", memory: {memory_mib}MiB"
    return f"{{name: {name}, threads: {threads}{memory}}}"


def _starter(shape: Shape, box: Box, token: Path, hosts: ExitStack) -> Report:
    def report(event: Event) -> None:
        if not isinstance(event, AwaitingWorkers):
            return
        for name, (threads, memory_mib) in shape.workers.items():
            own = f"--join {box[_COORDINATOR].address}:7100 --name {name} --threads {threads} --token-file {token}"
            memory = "" if memory_mib is None else f" --memory {memory_mib}MiB"
            words = f"-P -m llamaclust worker {own}{memory}".split()
            hosts.callback(_end, box.start(name, sys.executable, *words, stderr=subprocess.DEVNULL))

    return report


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait(_END_S)


def layers_of(cluster: Cluster) -> str:
    return " ".join(f"{stage.worker}:{stage.end - stage.start}" for stage in cluster.plan.stages)


def predicted(cluster: Cluster) -> Times:
    said = cluster.plan.prediction
    assert said is not None, "all workers are measured"
    token_s = said.token_s if cluster.config.objective == "latency" else 1 / said.tokens_per_s
    return {"token": 1e3 * token_s, "prompt": 1e3 * said.ttft_s}


async def compared(
    opening: Callable[[], AbstractAsyncContextManager[Cluster]], times: Callable[[Cluster], Awaitable[Times]]
) -> Measures:
    """Compares measured times of a cluster with the mean of two predictions: one before the measurement, and one after
    a restart."""
    async with opening() as cluster:
        said, layers = [predicted(cluster)], layers_of(cluster)
        await times(cluster)  # Warms up.
        taken = await times(cluster)
    async with opening() as cluster:
        said.append(predicted(cluster))
    found: dict[str, float | str] = {}
    for what, ms in taken.items():
        expected = sum(each[what] for each in said) / 2
        found |= {f"{what} ms": ms, f"{what} predicted": expected, f"{what} ratio": expected / ms}
    return {**found, "layers": layers}
