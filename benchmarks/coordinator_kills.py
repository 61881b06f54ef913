"""Kills the coordinator at random while clients stream, starts it again, and compares every answer with an undisturbed
run's.

    python benchmarks/coordinator_kills.py MODEL.gguf [--seed N] [--kills 20] [--streams 32] [--launcher local|static]

Prints tokens lost or changed (ids and logprob bits) and how long clients waited: from a kill to the next token of any
stream, the start of Python, of the workers (local) and the load included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.tools.chaos.load import Requests, Streams
from llamaclust.tools.chaos.tally import Comparison, Tally, pause_text

_READY_S = 60.0
_BETWEEN_S = (0.5, 3.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Bench:
    """A cluster that is started again and again from the same file."""

    file: Path
    environment: dict[str, str]
    api: str
    record: Path

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "llamaclust", "up", str(self.file)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stderr=(self.file.parent / "coordinator.log").open("wb"),
            start_new_session=True,
        )

    async def ready(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + _READY_S
        while not self._is_ready(process.pid):
            if time.monotonic() > end or process.poll() is not None:
                log = (self.file.parent / "coordinator.log").read_text().strip()
                raise TimeoutError(f"the cluster did not start within {_READY_S:g} s: {log}")
            await asyncio.sleep(0.01)

    def _is_ready(self, pid: int) -> bool:
        try:
            is_recorded = json.loads(self.record.read_text())["pid"] == pid
            return is_recorded and httpx.get(f"{self.api}/health", trust_env=False).is_success
        except (OSError, ValueError, httpx.HTTPError):
            return False


@contextmanager
def static_workers(count: int, port: int, environment: dict[str, str], logs: Path) -> Iterator[None]:
    """Workers that are not the coordinator's, as on other machines."""
    started = []
    try:
        for name in "abcdefgh"[:count]:
            with (logs / f"{name}.log").open("wb") as log:
                words = ["worker", "--join", f"127.0.0.1:{port}", "--insecure", "--name", name, "--threads", "1"]
                words += ["--listen", "127.0.0.1:0"]
                command = [sys.executable, "-m", "llamaclust", *words]
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@asynccontextmanager
async def bench(model: Path, launcher: str, workers: int, folder: Path) -> AsyncIterator[Bench]:
    port, join = free_port(), free_port()
    local = launcher == "local"
    speed = {"threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0} if local else {}
    values: dict[str, Any] = {
        "name": "kills",
        "model": str(model),
        "listen": f"127.0.0.1:{port}",
        "context_length": 512,
        "workers": [{"name": name, **speed} for name in "abcdefgh"[:workers]],
    }
    environment = os.environ | {"LLAMACLUST_STATE_DIR": str(folder / "state")}
    if not local:
        values |= {"launcher": "static", "insecure": True, "join": {"listen": f"127.0.0.1:{join}"}}
    file = folder / "kills.yaml"
    file.write_text(json.dumps(values))
    made = Bench(file, environment, f"http://127.0.0.1:{port}", folder / "state" / "kills" / "cluster.json")
    with static_workers(0 if local else workers, join, environment, folder):
        yield made


async def run(model: Path, seed: int, kills: int, streams: int, launcher: str, workers: int) -> Comparison:
    source, pauses_s = Random(seed), []
    with tempfile.TemporaryDirectory(prefix="llamaclust-kills-") as name:
        async with bench(model, launcher, workers, Path(name)) as cluster:
            process = cluster.start()
            try:
                await cluster.ready(process)
                tally, done = Tally(seed), asyncio.Event()
                async with AsyncClient(cluster.api) as client:
                    load = Streams(client, Requests(), tally)
                    await load.undisturbed(streams)
                    running = asyncio.gather(*(load.repeat(number, done) for number in range(streams)))
                    for _ in range(kills):
                        await asyncio.sleep(source.uniform(*_BETWEEN_S))
                        process.send_signal(signal.SIGKILL)
                        killed_s = time.monotonic()
                        process.wait()
                        process = cluster.start()
                        await cluster.ready(process)
                        while load.last_token_s < killed_s + 0.05:  # noqa: ASYNC110  other tasks set it
                            await asyncio.sleep(0.005)
                        pauses_s.append(load.last_token_s - killed_s)
                    done.set()
                    await running
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
    compared = tally.compared
    print(f"{kills} kills, {compared.answers} answers of {compared.tokens} tokens", end=": ")
    print(f"{compared.lost} lost, {compared.changed} changed{pause_text(pauses_s)}")
    for error, count in tally.errors.items():
        print(f"{count} answers ended with: {error}")
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--launcher", choices=("local", "static"), default="local")
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.launcher}, {given.workers} workers, {given.streams} streams")
    compared = asyncio.run(run(given.model, given.seed, given.kills, given.streams, given.launcher, given.workers))
    if not compared.is_intact:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
