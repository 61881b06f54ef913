"""Workers as processes on this machine: spawned, watched, reaped. They end with the coordinator, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from llamaclust.cluster.last_words import last_words
from llamaclust.cluster.launchers.base import Exited, GaveUp, WorkerSpec
from llamaclust.cluster.launchers.run_directory import RunDirectory
from llamaclust.model.loader import Model
from llamaclust.wire.deadlines import deadline
from llamaclust.worker.devices import check_devices
from llamaclust.worker.machine import available_memory_bytes

_GRACE_S = 1.0
_INHERITED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
_INHERITED_PREFIXES = ("LC_", "PYTHON", "GRPC_", "ASAN_", "TSAN_", "UBSAN_")


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often a worker whose process ends is started again, and after which pause."""

    most: int = 6
    within_s: float = 60.0
    first_s: float = 0.1  # the second time within so long; the first time at once, and then twice as long each time

    def pause_s(self, before: int) -> float:
        """Where it was started again so often already."""
        return self.first_s * 2 ** (before - 1) if before else 0.0


class LocalLauncher:
    """See `Launcher`. Call `start` from a thread that lives as long as the cluster: workers end with that thread."""

    def __init__(self, run: RunDirectory, logs: Path, restarts: Restarts | None = None) -> None:
        self._run = run
        self._logs = logs
        self._restarts = restarts or Restarts()
        self._processes: dict[str, Process] = {}
        self._log_starts: dict[str, int] = {}  # of the process that runs, in bytes
        self._sockets = count()
        self._watches: list[asyncio.Task[None]] = []
        self._gave_up: GaveUp | None = None
        self._kept_up = asyncio.Event()
        self._stopping = asyncio.Event()

    @property
    def pids(self) -> Mapping[str, int]:
        return {name: process.pid for name, process in self._processes.items() if process.returncode is None}

    def check(self, workers: Sequence[WorkerSpec], model: Model) -> None:
        check_devices(((worker.device, worker.feature_level) for worker in workers), model)

    async def start(self, workers: Sequence[WorkerSpec], join: str, exited: Exited) -> None:
        for spec in workers:
            await self._spawn(spec, join)
            self._watches.append(asyncio.create_task(self._watch(spec, join, exited)))

    @contextmanager
    def keeping_up(self, gave_up: GaveUp) -> Iterator[None]:
        """One that ends too often within a minute is given up."""
        self._gave_up = gave_up
        self._kept_up.set()
        try:
            yield
        finally:
            self._kept_up.clear()

    async def end(self, name: str) -> None:
        """By SIGKILL: whoever is lost hears nothing else."""
        process = self._processes.get(name)
        if process is not None and process.returncode is None:
            _kill(process, signal.SIGKILL)
            async with deadline(f"the end of worker {name}", _GRACE_S):
                await process.wait()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is still there a second later."""
        self._stopping.set()
        self._kept_up.set()
        self._signal(signal.SIGTERM)
        if self._watches:
            await asyncio.wait(self._watches, timeout=_GRACE_S)
            self._signal(signal.SIGKILL)
            await asyncio.wait(self._watches, timeout=_GRACE_S)

    def free_memory_bytes(self) -> int:
        """Of this machine, where all of them are."""
        return available_memory_bytes()

    def last_words(self, name: str) -> str:
        return last_words(self._log_file(name), self._log_starts.get(name, 0))

    def _log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def _spawn(self, spec: WorkerSpec, join: str) -> None:
        """A new process for a worker. The first one begins its log, others go on with it."""
        arguments = list(_arguments(spec, join, self._run.worker(next(self._sockets)), self._run.token_file))
        anew = 0 if spec.name in self._processes else os.O_TRUNC
        log = os.open(self._log_file(spec.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | anew, 0o600)
        try:
            self._log_starts[spec.name] = os.fstat(log).st_size
            self._processes[spec.name] = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "llamaclust.worker",
                *arguments,
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
                env=worker_environment(os.environ),
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _watch(self, spec: WorkerSpec, join: str, exited: Exited) -> None:
        """A worker's processes, one after the other."""
        ends_s: list[float] = []
        while True:
            code = await self._processes[spec.name].wait()
            if self._stopping.is_set():
                return
            exited(spec.name, describe_exit(code))
            await self._kept_up.wait()
            if not await self._may_restart(spec.name, code, ends_s):
                return
            await self._spawn(spec, join)
            if self._stopping.is_set():
                _kill(self._processes[spec.name], signal.SIGKILL)

    async def _may_restart(self, name: str, code: int, ends_s: list[float]) -> bool:
        """Waits as long as is due; `ends_s` has the times of its ends so far. False where that is all."""
        now_s, limits = asyncio.get_running_loop().time(), self._restarts
        ends_s[:] = [end_s for end_s in ends_s if end_s > now_s - limits.within_s]
        if len(ends_s) >= limits.most and not self._stopping.is_set():
            assert self._gave_up is not None
            often = f"it was started again {limits.most} times within {limits.within_s:g} s, which did not help"
            self._gave_up(name, f"{describe_exit(code)}; {often}")
            return False
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), limits.pause_s(len(ends_s)))
        ends_s.append(now_s)
        return self._kept_up.is_set() and not self._stopping.is_set()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                _kill(process, number)


def _kill(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)  # `send_signal` would reap it before its end is heard of


def describe_exit(code: int) -> str:
    """How a process ended, from its return code as `subprocess` gives it."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    why = ", by someone or for lack of memory" if -code == signal.SIGKILL else ""
    return f"its process was killed by signal {-code} ({name}){why}"


def _arguments(spec: WorkerSpec, join: str, listen: str, token_file: Path) -> Iterator[str]:
    options = {
        "--name": spec.name,
        "--join": join,
        "--listen": listen,
        "--token-file": token_file,
        "--device": spec.device,
        "--threads": spec.threads,
        "--memory-bytes": spec.memory_bytes,
        "--feature-level": spec.feature_level or None,
        "--prepared-dir": spec.prepared_dir,
        "--prepared-bytes": spec.prepared_bytes if spec.prepared_dir else None,
        "--weights-dir": spec.weights_dir,
        "--weights-bytes": spec.weights_bytes if spec.weights_dir else None,
        "--parent-pid": os.getpid(),
        "--log-format": spec.log_format,
        "--cluster": spec.cluster or None,
    }
    for option, value in options.items():
        if value is not None:
            yield from (option, str(value))


def worker_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: nothing that may hold a secret."""
    inherited = {
        name: value for name, value in variables.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return inherited | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's own threads, one a core otherwise, would only wait
