"""Cost of network links: two workers of one thread each on emulated hosts, beside one worker without a network.

    python benchmarks/network.py MODEL.gguf [--repeats 5]       (as root: network namespaces)

The coordinator and both workers have a host each, so a token travels three links: half a round trip each. Prints
medians of the ratios of pairs, measured in turn: at a round trip of 0.5 ms, decode of one request beside one worker,
each process on a core; at 20 ms, decode of 8 requests beside 8 / (links + stage times), and prefill of 8 prompts with
and without pipelining.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()
sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from measuring.answers import prompts, run  # noqa: E402
from measuring.lines import show  # noqa: E402
from measuring.placement import pinned_to_cores  # noqa: E402
from split import difference  # noqa: E402

from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.scheduler import scheduler  # noqa: E402
from llamaclust.cluster.scheduler.rows.chunking import chunk_rows  # noqa: E402
from llamaclust.cluster.scheduler.stage_times import StageTimes  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.directory import ClusterDir  # noqa: E402
from llamaclust.cluster.state.events import AwaitingWorkers, Event, Report  # noqa: E402
from support.network.box import Box, missing  # noqa: E402
from support.network.link import Link  # noqa: E402
from support.network.namespaces import entered  # noqa: E402

COORDINATOR = "coordinator"
_WORKERS = ("a", "b")
_REQUESTS = 8
_LINKS = 3  # coordinator, first stage, last stage, coordinator
_NEAR_S = 0.0005
_FAR_S = 0.020


@dataclass(frozen=True, slots=True)
class Together:
    """Decode of 8 requests."""

    tok_s: float
    bound_tok_s: float  # 8 / (links + stage times)
    rows: float  # of a microbatch, in the mean
    stage_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    tokens: int  # of each answer
    prompt: int
    parts: frozenset[str]  # near, far


async def alone_tok_s(cluster: Cluster, source: random.Random, tokens: int) -> float:
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    return (await run(cluster, prompts(source, 1, 16, vocabulary)[0], tokens)).timings.decode_tok_s


async def together(cluster: Cluster, source: random.Random, tokens: int) -> Together:
    requested = prompts(source, _REQUESTS, 1, cluster.model.hyperparameters.vocabulary_size)
    before = cluster.engine.metrics.stage_report()
    begun = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, tokens) for prompt in requested))
    took_s = time.perf_counter() - begun
    rows, stage_ms = difference(before, cluster.engine.metrics.stage_report())
    round_s = _LINKS * _FAR_S / 2 + sum(stage_ms) / 1e3
    return Together(_REQUESTS * tokens / took_s, _REQUESTS / round_s, rows, stage_ms)


async def prefill_s(cluster: Cluster, source: random.Random, tokens: int) -> float:
    """From the first submission to the last first token."""
    requested = prompts(source, _REQUESTS, tokens, cluster.model.hyperparameters.vocabulary_size)
    begun = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, 1) for prompt in requested))
    return time.perf_counter() - begun


@contextmanager
def one_in_flight() -> Iterator[None]:
    """The scheduler sends a microbatch when the one before has come back."""
    with patch.object(StageTimes, "in_flight", 1), patch.object(scheduler, "chunk_rows", _rows_beside_decode):
        yield


def _rows_beside_decode(*of: Any, alone: bool) -> int:
    """As many as where others decode: alone, a prompt's chunks are divided over stages."""
    return chunk_rows(*of, alone=False)


@asynccontextmanager
async def local_cluster(model: Path, folder: Path) -> AsyncIterator[Cluster]:
    """One worker beside the coordinator, without a network."""
    async with _opened(model, folder / "one", ["workers=[{name: one, threads: 1}]"]) as cluster:
        yield cluster


@asynccontextmanager
async def distant_cluster(
    box: Box,
    model: Path,
    folder: Path,
    workers: Sequence[str] = _WORKERS,
    more: Sequence[str] = (),
    beside: str | None = None,
) -> AsyncIterator[Cluster]:
    """Workers on hosts of their own, but one that is `beside` this process, on the coordinator's host; over mutual TLS.
    `more` keys of the cluster file may be given."""
    here = box[COORDINATOR].address
    keys = ["launcher=static", f"join={{listen: {here}:7100, members: {here}:7101}}"]
    keys.append(f"workers=[{', '.join(f'{{name: {name}}}' for name in workers)}]")
    token = folder / ".trust" / "token"

    def report(event: Event) -> None:
        if isinstance(event, AwaitingWorkers):
            for name in workers:
                command = f"-P -m llamaclust worker --join {here}:7100 --name {name} --threads 1 --token-file {token}"
                box.start(
                    COORDINATOR if name == beside else name, sys.executable, *command.split(), stderr=subprocess.DEVNULL
                )

    async with _opened(model, folder / "distant", [*keys, *more], report) as cluster:
        yield cluster


@asynccontextmanager
async def _opened(
    model: Path, folder: Path, keys: list[str], report: Report = lambda event: None
) -> AsyncIterator[Cluster]:
    directory = ClusterDir(folder)
    directory.create()
    config = load_config(None, [f"model={model}", "context_length=1024", "objective=throughput", *keys])
    async with open_cluster(config, [model], directory, report) as cluster:
        yield cluster


async def measure(box: Box, model: Path, repeats: int, sizes: Sizes) -> None:
    source = random.Random(7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        async with local_cluster(model, path) as one, distant_cluster(box, model, path) as two:
            if "near" in sizes.parts:
                await near(box, one, two, source, repeats, sizes)
            if "far" in sizes.parts:
                await far(box, two, source, repeats, sizes)


async def near(box: Box, one: Cluster, two: Cluster, source: random.Random, repeats: int, sizes: Sizes) -> None:
    box.set_link(Link.of_round_trip(_NEAR_S))
    pairs = []
    for _ in range(repeats + 1):
        with pinned_to_cores(one):
            one_tok_s = await alone_tok_s(one, source, sizes.tokens)
        with pinned_to_cores(two):
            pairs.append((one_tok_s, await alone_tok_s(two, source, sizes.tokens)))
    one_tok_s, two_tok_s = pairs[-1]
    print(f"one worker {one_tok_s:.1f} tok/s, two at {_NEAR_S * 1e3:g} ms {two_tok_s:.1f} tok/s")
    show("0.5 ms: decode of one request beside one worker", [two / one for one, two in pairs[1:]], ">= 0.95 (1.1B)")


async def far(box: Box, two: Cluster, source: random.Random, repeats: int, sizes: Sizes) -> None:
    box.set_link(Link.of_round_trip(_FAR_S))
    decodes, prefills = [], []
    for _ in range(repeats + 1):
        decodes.append(await together(two, source, sizes.tokens))
        pipelined_s = await prefill_s(two, source, sizes.prompt)
        with one_in_flight():
            prefills.append((await prefill_s(two, source, sizes.prompt), pipelined_s))
    last = decodes[-1]
    print(f"8 requests at {_FAR_S * 1e3:g} ms: {last.tok_s:.1f} tok/s, microbatches of {last.rows:.1f} rows, ", end="")
    print(f"stages {[round(ms, 2) for ms in last.stage_ms]} ms; prefill {prefills[-1][1]:.2f} s, ", end="")
    print(f"{prefills[-1][0]:.2f} s with one chunk in flight")
    show(
        "20 ms: decode of 8 requests beside 8 / (links + stages)",
        [d.tok_s / d.bound_tok_s for d in decodes[1:]],
        ">= 0.90",
    )
    show(
        f"20 ms: prefill of 8 x {sizes.prompt}, one in flight / pipelined", [a / b for a, b in prefills[1:]], ">= 1.70"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--part", choices=("near", "far"), help="one of the two round trips alone")
    given = parser.parse_args()
    if (reason := missing()) is not None:
        sys.exit(f"error: {reason}")
    parts = frozenset((given.part,) if given.part else ("near", "far"))
    with Box([COORDINATOR, *_WORKERS], delays=True) as box, entered(box[COORDINATOR].namespace):
        asyncio.run(measure(box, given.model, given.repeats, Sizes(given.tokens, given.prompt, parts)))


if __name__ == "__main__":
    main()
