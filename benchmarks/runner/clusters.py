"""Starts clusters of processes: `llamaclust up` with a cluster file, standbys, and static workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from llamaclust.cluster.membership.authority import trust_folder
from llamaclust.cluster.state.directory import ClusterDir

_READY_S = 600.0
_END_S = 60.0
_LOOK_S = 0.02
_NAME = "bench"
_COMMAND = (sys.executable, "-P", "-m", "llamaclust")
_NAMES = "abcdefgh"
MOST_WORKERS = len(_NAMES)
_SPEED = {"threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The parts of a cluster. `keys` are added to the cluster file. `prefixes` has words to put before the command of a
    worker, by worker. With `is_secure`, static workers use mutual TLS."""

    launcher: str = "local"
    workers: int = 3
    keys: Mapping[str, Any] = field(default_factory=dict)
    prefixes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_secure: bool = False
    home: Path | None = None  # Folder of caches; None for a new folder.

    @property
    def names(self) -> str:
        return _NAMES[: self.workers]


class Bench:
    def __init__(self, model: Path, layout: Layout, folder: Path, command: Sequence[str] = _COMMAND) -> None:
        self._layout = layout
        self._folder = folder
        self._command = command
        self._join, self._members = free_port(), free_port()
        self.started: list[subprocess.Popen[bytes]] = []
        self.api = f"http://127.0.0.1:{free_port()}"
        self.directory = ClusterDir(folder / "state" / _NAME)
        self.file = folder / f"{_NAME}.yaml"
        self.file.write_text(json.dumps(self._values(model)))

    def _values(self, model: Path) -> dict[str, Any]:
        values: dict[str, Any] = {"name": _NAME, "model": str(model.resolve()), "listen": self.api.split("//")[1]}
        speed = dict(_SPEED)
        if self._layout.launcher == "static":
            join = {"listen": f"127.0.0.1:{self._join}", "members": f"127.0.0.1:{self._members}"}
            values |= {"launcher": "static", "insecure": not self._layout.is_secure, "join": join}
            del speed["threads"]
        return values | {"workers": [{"name": name, **speed} for name in self._layout.names], **self._layout.keys}

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "LLAMACLUST_STATE_DIR": self._folder / "state",
            "LLAMACLUST_HOME": self._layout.home or self._folder / "home",
        }
        return os.environ | {name: str(path) for name, path in own.items()}

    @property
    def coordinator(self) -> psutil.Process:
        return psutil.Process(self.started[-1].pid)

    @property
    def log(self) -> str:
        return (self._folder / "coordinator.log").read_text(errors="replace")

    def up(self, *options: str) -> subprocess.Popen[bytes]:
        with (self._folder / "coordinator.log").open("ab") as log:
            words = [*self._command, "up", str(self.file), *options]
            process = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    async def standby(self) -> subprocess.Popen[bytes]:
        process = self.up("--standby")
        await self._until(lambda: self.directory.has_standby, process, "a standby")
        return process

    async def ready(self, process: subprocess.Popen[bytes]) -> None:
        await self._until(lambda: self._is_ready(process.pid), process, "the cluster")

    async def _until(self, happens: Callable[[], bool], process: subprocess.Popen[bytes] | None, what: str) -> None:
        end_s = time.monotonic() + _READY_S
        while not happens():
            if time.monotonic() > end_s or (process is not None and process.poll() is not None):
                raise SystemExit(f"{what} did not start within {_READY_S:g} s: {self.log[-2000:].strip()}")
            await asyncio.sleep(_LOOK_S)

    def _is_ready(self, pid: int) -> bool:
        record = self.directory.read_record()
        try:
            return (
                record is not None and record.pid == pid and httpx.get(f"{self.api}/health", trust_env=False).is_success
            )
        except httpx.HTTPError:
            return False

    async def status(self) -> dict[str, Any]:
        state: dict[str, Any] = (await self.cluster())["status"]
        return state

    async def cluster(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self.api, trust_env=False, timeout=60.0) as client:
            found: dict[str, Any] = (await client.get("/cluster")).json()
            return found

    @asynccontextmanager
    async def static_workers(self) -> AsyncIterator[None]:
        """Runs the workers of a static cluster as if on other machines. Restarts them whenever they end."""
        names = self._layout.names if self._layout.launcher == "static" else ""
        tasks = [asyncio.create_task(self._keep_up(name)) for name in names]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_up(self, name: str) -> None:
        words = ["worker", "--join", f"127.0.0.1:{self._join}", "--name", name, "--threads", "1"]
        token = trust_folder(self.directory.path) / "token"
        words += ["--token-file", str(token)] if self._layout.is_secure else ["--insecure"]
        prefix = self._layout.prefixes.get(name, ())
        with (self._folder / f"{name}.log").open("ab") as log:
            await self._until(lambda: token.exists() or not self._layout.is_secure, None, "the cluster's authority")
            while True:
                process = await asyncio.create_subprocess_exec(
                    *prefix, *_COMMAND, *words, "--listen", "127.0.0.1:0", env=self.environment, stdout=log, stderr=log
                )
                try:
                    await process.wait()
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()

    def close(self) -> None:
        """Ends standbys before the coordinator, so that no standby takes over."""
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Cancels the current task at SIGTERM, so that the task cleans up before the process ends."""
    loop, task, received = asyncio.get_running_loop(), asyncio.current_task(), False
    assert task is not None

    def cancel() -> None:
        nonlocal received
        if not received:
            received = True
            task.cancel()

    loop.add_signal_handler(signal.SIGTERM, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if received:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@asynccontextmanager
async def running(
    model: Path, layout: Layout, command: Sequence[str] = _COMMAND
) -> AsyncIterator[tuple[Bench, subprocess.Popen[bytes]]]:
    """Yields a cluster that is ready, and its coordinator. At the end, ends all processes and removes the folder."""
    with _ended_by_sigterm(), TemporaryDirectory(prefix="llamaclust-bench-") as folder:
        bench = Bench(model, layout, Path(folder), command)
        async with bench.static_workers():
            try:
                process = bench.up()
                await bench.ready(process)
                yield bench, process
            finally:
                await asyncio.to_thread(bench.close)


def resident_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / (1 << 20)


def processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
