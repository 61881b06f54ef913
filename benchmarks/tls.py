"""Cost of mutual TLS: static clusters of two 1-thread workers on loopback with it and without, in turn; and one hop.

    python benchmarks/tls.py MODEL.gguf [--repeats 9] [--tokens 128] [--hops 2000]

Prints the median ratio of decode, and of a hop (one token's hidden state: packed, sent, received, unpacked) half the
round trip to another process, and the time of this process's processor; beside it a hop on a Unix socket, without gRPC,
as workers of one machine have it. A cut plan and one request: nothing hides what a hop takes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

import numpy as np  # noqa: E402

from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.membership.authority import Authority  # noqa: E402
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.directory import ClusterDir  # noqa: E402
from llamaclust.cluster.state.events import AwaitingWorkers, Event  # noqa: E402
from llamaclust.wire.microbatch.codec import encode_microbatch  # noqa: E402
from llamaclust.wire.microbatch.frames import encode_hidden  # noqa: E402
from llamaclust.wire.microbatch.messages import Chunk, Microbatch  # noqa: E402
from llamaclust.wire.rpc.client import Peer  # noqa: E402
from llamaclust.wire.rpc.deadlines import deadline  # noqa: E402
from llamaclust.wire.rpc.methods import SAMPLE  # noqa: E402
from llamaclust.wire.rpc.server import Server, ServerStream  # noqa: E402
from llamaclust.wire.security.credentials import COORDINATOR, Credentials, Insecure, Principal  # noqa: E402
from llamaclust.wire.security.token import ClusterToken  # noqa: E402

_PROMPT_TOKENS = 16
_DEADLINE_S = 300.0
_KIB = (2, 4, 8, 16)
_WORKER = Principal("w0")
_TOKEN = ClusterToken("benchmark" * 5)


@dataclass(frozen=True, slots=True)
class Turn:
    """Decode of one request, tokens per second."""

    tls: float
    insecure: float


@asynccontextmanager
async def cluster_of(model: Path, folder: Path, *, insecure: bool) -> AsyncIterator[Cluster]:
    join = "{listen: 127.0.0.1:0, members: 127.0.0.1:0}"
    overrides = [f"model={model}", "launcher=static", "workers=[{name: w0}, {name: w1}]", f"join={join}"]
    overrides += [f"insecure={str(insecure).lower()}", "context_length=1024", "objective=throughput"]
    directory = ClusterDir(folder / ("insecure" if insecure else "tls"))
    directory.create()
    with ExitStack() as workers:

        def report(event: Event) -> None:
            if isinstance(event, AwaitingWorkers):
                found = re.search(r"--join (\S+)", " ".join(event.lines))
                assert found is not None
                token = directory.path.parent / ".trust" / "token"
                known = ("--insecure",) if insecure else ("--token-file", str(token))
                for name in ("w0", "w1"):
                    workers.enter_context(
                        program("worker", "--join", found[1], "--name", name, *known, "--threads", "1")
                    )

        async with open_cluster(load_config(None, overrides), [model], directory, report) as cluster:
            yield cluster


@contextmanager
def program(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "llamaclust", *arguments], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


async def decode(cluster: Cluster, source: random.Random, tokens: int) -> float:
    vocabulary = cluster.model.hyperparameters.vocabulary_size
    prompt = tuple(source.randrange(3, vocabulary) for _ in range(_PROMPT_TOKENS))
    async with deadline("a benchmark's answer", _DEADLINE_S):
        async for event in cluster.engine.submit(GenerationRequest("benchmark", prompt, tokens, min_tokens=tokens)):
            if isinstance(event, Finished):
                return event.timings.decode_tok_s
    raise AssertionError("a request ends with Finished")


async def compare(model: Path, repeats: int, tokens: int) -> list[Turn]:
    """Turns of both, the first of which alternates, after one that warms up both."""
    source, turns = random.Random(7), []
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        async with (
            cluster_of(model, Path(folder), insecure=False) as tls,
            cluster_of(model, Path(folder), insecure=True) as insecure,
        ):
            for turn in range(repeats + 1):
                order = (tls, insecure) if turn % 2 else (insecure, tls)
                speeds = {id(setup): await decode(setup, source, tokens) for setup in order}
                turns.append(Turn(speeds[id(tls)], speeds[id(insecure)]))
    return turns[1:]


async def echo(stream: ServerStream) -> None:
    """A stage that computes nothing: what comes is unpacked, packed again and sent back."""
    await stream.accept()
    while (data := await stream.read()) is not None:
        await stream.write(bytes(memoryview(data)))


async def serve(trust: Path | None, socket: Path | None) -> None:
    """The other process of a hop: prints its address and serves until it is ended."""
    credentials: Credentials = Insecure() if trust is None else Authority.open(trust).identity(_WORKER)
    if socket is not None:
        credentials = _TOKEN
    address = "127.0.0.1:0" if socket is None else f"unix:{socket}"
    server = await Server.start(address, credentials, {SAMPLE: echo})
    print(server.address, flush=True)
    async with deadline("the benchmark", _DEADLINE_S):
        await asyncio.Event().wait()


@contextmanager
def other_process(*options: str) -> Iterator[str]:
    """The address of a process that echoes."""
    command = [sys.executable, __file__, "--serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@dataclass(frozen=True, slots=True)
class Hops:
    """Microseconds one way, and of this process's processor."""

    one_way: list[float]
    processor: float

    def __str__(self) -> str:
        return f"{median(self.one_way):7.0f} / {quantiles(self.one_way, n=100)[-1]:5.0f}  ({self.processor:4.0f})"


async def hops(credentials: Credentials, address: str, count: int) -> dict[int, Hops]:
    """By KiB of the hidden state."""
    peer = Peer(address, credentials, _WORKER)
    stream = peer.open(SAMPLE, epoch=1)
    await stream.opened()
    header = encode_microbatch(Microbatch("0" * 64, 1, 1, (Chunk((1,), 0, (0, 1), 1),)))
    measured: dict[int, Hops] = {}
    for kib in _KIB:
        hidden = np.random.default_rng(1).standard_normal((1, 256 * kib), dtype=np.float32)
        trips, begun_s = [], time.process_time()
        for _ in range(count):
            begun_ns = time.perf_counter_ns()
            await stream.write(encode_hidden(header, hidden))
            data = await stream.read()
            assert data is not None
            trips.append((time.perf_counter_ns() - begun_ns) / 2e3)
        measured[kib] = Hops(trips[count // 10 :], (time.process_time() - begun_s) / count * 5e5)
    await peer.close()
    return measured


async def measure_hops(count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        trust = Path(folder) / "trust"
        identity = Authority.open(trust).identity(COORDINATOR)
        with other_process() as plain_address, other_process("--trust", str(trust)) as secure_address:
            ways = [await hops(Insecure(), plain_address, count), await hops(identity, secure_address, count)]
        with other_process("--socket", f"{folder}/s") as address:
            ways.append(await hops(_TOKEN, address, count))
    print(
        f"us one way: p50 / p99 (processor){'insecure':>12}{'mutual TLS':>25}{'Unix socket':>25}   (TLS: target < 120)"
    )
    for kib in _KIB:
        print(f"{kib:4} KiB              {''.join(f'{way[kib]!s:>25}' for way in ways)}", flush=True)


def show(turns: list[Turn]) -> None:
    ratios = [turn.tls / turn.insecure for turn in turns]
    speeds = f"{median(turn.tls for turn in turns):.1f} beside {median(turn.insecure for turn in turns):.1f} tok/s"
    print(
        f"decode with mutual TLS / insecure: {median(ratios):.3f}   ({min(ratios):.3f} .. {max(ratios):.3f}), {speeds}"
    )
    print("target: >= 0.97")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--hops", type=int, default=2000, help="round trips of each size; 0: none")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trust", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--socket", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.trust, given.socket))
        return
    if given.hops:
        asyncio.run(measure_hops(given.hops))
    if given.model is not None:
        show(asyncio.run(compare(given.model, given.repeats, given.tokens)))


if __name__ == "__main__":
    main()
