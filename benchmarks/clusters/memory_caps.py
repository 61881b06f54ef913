"""A model that none of its workers could hold alone: its plan, memory and speed beside the machine's read bandwidth.

    python benchmarks/shape.py 70b IQ1_S 70b.gguf --vocabulary 128256
    python benchmarks/clusters/memory_caps.py 70b.gguf [--workers 3] [--memory 6144] [--threads N] [--tokens 24]
        [--cache GIB] [--without-prompt]

The model's file has 13.8 GB, and 17.1 GB in memory. Each worker is told that it may take `--memory` MiB, and the system
refuses it (as every process here) more address space than 2 GiB above that (RLIMIT_AS). The cluster is started with
nothing measured before, and again with what the first start left: measurements, and `--cache` GiB of packed layers, for
whose writing the first start waits before anything is timed. One request at a time, so stages compute in turns, each on
`--threads` threads, all cores by default: the bound of decode is one reading of all bytes that a token touches, at the
mean of the read bandwidths right before and behind it. Exit code 1: a prediction of decode is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring.answers import prompts, run
from measuring.options import positive
from measuring.predictions import count_near

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Event, Measuring, PlanMade
from llamaclust.core.sizes import MIB
from llamaclust.kernels.probes import ReadProbe
from llamaclust.model.gguf.model_file import open_model

_ADDRESSES_MIB = 2048
"""Of a process, for its programs, stacks and what is never touched."""
_CONTEXT, _DECODE_PROMPT = 1024, 16
_WRITTEN_S = 5.0  # without a change


@dataclass(slots=True)
class Start:
    """When a start did what, in seconds from its beginning."""

    begun_s: float = field(default_factory=time.perf_counter)
    measuring_s: float | None = None
    planned_s: float = 0.0
    ready_s: float = 0.0

    def report(self, event: Event) -> None:
        if isinstance(event, Measuring):
            self.measuring_s = self.measuring_s or self.passed_s
        if isinstance(event, PlanMade):
            self.planned_s = self.passed_s
            print("\n".join(event.lines), flush=True)

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self.begun_s

    def __str__(self) -> str:
        measured = "" if self.measuring_s is None else f", {self.planned_s - self.measuring_s:.1f} of it measuring"
        return f"ready after {self.ready_s:.1f} s (plan {self.planned_s:.1f}{measured}; weights {self._loaded_s:.1f})"

    @property
    def _loaded_s(self) -> float:
        return self.ready_s - self.planned_s


@asynccontextmanager
async def started(given: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[Cluster, Start]]:
    directory, start = ClusterDir(folder / "capped"), Start()
    directory.create()
    names = [chr(97 + index) for index in range(given.workers)]
    each = f"threads: {given.threads}, memory: {given.memory}MiB"
    workers = ", ".join(f"{{name: {name}, {each}}}" for name in names)
    keys = [f"model={given.model}", f"context_length={_CONTEXT}", f"workers=[{workers}]"]
    keys += ["max_sequences=1", f"kv_memory={given.kv}MiB", f"state_dir={folder}"]
    async with open_cluster(load_config(None, keys), [given.model], directory, start.report) as cluster:
        start.ready_s = start.passed_s
        yield cluster, start


async def written(folder: Path) -> None:
    """Until packed layers have all been written in the background."""
    seen, since_s = -1, time.monotonic()
    while time.monotonic() < since_s + _WRITTEN_S:
        n_bytes = packed_bytes(folder)
        if n_bytes != seen:
            seen, since_s = n_bytes, time.monotonic()
        await asyncio.sleep(0.5)
    if seen > 0:
        print(f"  {seen / MIB:.0f} MiB of packed layers are on disk", flush=True)


def packed_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("packed/*"))


def memory_of(pid: int) -> Iterator[float]:
    """MiB: resident, at most so far, of address space."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}
    yield from (int(values[key][0]) / 1024 for key in ("VmRSS", "VmHWM", "VmPeak"))


def show_memory(cluster: Cluster, given: argparse.Namespace) -> None:
    for stage in cluster.plan.stages:
        resident, most, addresses = memory_of(cluster.registry.present[stage.worker].registration.pid)
        print(
            f"  {stage.worker}: layers [{stage.start}, {stage.end}), {resident:.0f} MiB resident, at most {most:.0f} "
            f"of {given.memory}; address space {addresses:.0f} of {given.memory + _ADDRESSES_MIB}"
        )
    coordinator = list(memory_of(os.getpid()))
    print(f"  coordinator: at most {coordinator[1]:.0f} MiB resident, the buffer of the read probe included")


async def decode(cluster: Cluster, tokens: int, probe: ReadProbe, source: random.Random) -> float:
    """Prints how fast, beside plan and bandwidth; predicted / measured."""
    vocabulary, said = cluster.model.hyperparameters.vocabulary_size, cluster.plan.prediction
    assert said is not None, "all workers are measured"
    await run(cluster, prompts(source, 1, _DECODE_PROMPT, vocabulary)[0], 3)  # warms up
    before = probe.measure()
    finished = await run(cluster, prompts(source, 1, _DECODE_PROMPT, vocabulary)[0], tokens)
    read = (before + probe.measure()) / 2
    token_s = 1 / finished.timings.decode_tok_s
    touched_gb = sum(stage.touched_bytes for stage in cluster.plan.stages) / 1e9
    in_file = 1 - cluster.model.file.tensor("token_embd.weight").n_bytes / cluster.model.file.size_bytes
    file_gb = in_file * cluster.model.file.size_bytes / 1e9
    print(f"  decode: {1e3 * token_s:.0f} ms a token, predicted {1e3 * said.token_s:.0f}, ", end="")
    print(f"ratio {said.token_s / token_s:.3f}; {1 / token_s:.2f} tok/s")
    print(
        f"  {touched_gb:.2f} GB read a token ({file_gb:.2f} in the file) at {touched_gb / token_s:.1f} GB/s: ", end=""
    )
    print(f"{touched_gb / token_s / read:.2f} of {read:.1f} GB/s ({file_gb / token_s / read:.2f} by the file's bytes)")
    return said.token_s / token_s


async def prefill(cluster: Cluster, source: random.Random) -> None:
    vocabulary, said, tokens = cluster.model.hyperparameters.vocabulary_size, cluster.plan.prediction, cluster.plan
    assert said is not None, "all workers are measured"
    finished = await run(cluster, prompts(source, 1, tokens.prompt_tokens, vocabulary)[0], 1)
    taken_s = finished.timings.ttft_ms / 1e3
    print(
        f"  first token of a prompt of {tokens.prompt_tokens}: {taken_s:.1f} s, predicted {said.ttft_s:.1f}, ", end=""
    )
    print(f"ratio {said.ttft_s / taken_s:.3f}", flush=True)


async def measure(given: argparse.Namespace, folder: Path) -> list[float]:
    ratios, source, probe = [], random.Random(1), ReadProbe(given.threads)
    for number in range(2):
        async with started(given, folder) as (cluster, start):
            print(f"start {number + 1}: {start}", flush=True)
            await written(folder)
            ratios.append(await decode(cluster, given.tokens, probe, source))
            if not given.without_prompt and number == 0:
                await prefill(cluster, source)
            show_memory(cluster, given)
    return ratios


def main(given: argparse.Namespace) -> int:
    most_bytes = (given.memory + _ADDRESSES_MIB) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    os.environ["LLAMACLUST_CACHE_SIZE"] = f"{given.cache}GiB" if given.cache else "0"
    with TemporaryDirectory(prefix="llamaclust-bench-", dir=given.model.parent) as folder:
        os.environ["LLAMACLUST_HOME"] = folder
        print(f"{given.model}: {open_model(given.model).size_bytes / 1e9:.2f} GB", flush=True)
        ratios = asyncio.run(measure(given, Path(folder)))
    return 0 if count_near(ratios) == len(ratios) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--workers", type=positive, default=3, help="%(default)s by default")
    parser.add_argument("--memory", type=positive, default=6144, help="MiB of each; %(default)s by default")
    parser.add_argument("--kv", type=positive, default=512, help="MiB of KV memory of all; %(default)s by default")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each worker")
    parser.add_argument("--tokens", type=positive, default=24, help="%(default)s by default")
    parser.add_argument("--cache", type=int, default=0, help="GiB of packed layers kept on disk, beside the model")
    parser.add_argument("--without-prompt", action="store_true", help="do not time a prompt")
    return parser.parse_args()


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main(parse()))
