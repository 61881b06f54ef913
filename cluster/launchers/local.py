"""Workers as processes on this machine: spawned, watched, reaped. They end with the coordinator, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llamaclust.cluster.last_words import last_words
from llamaclust.cluster.launchers.base import Exited, WorkerSpec
from llamaclust.cluster.launchers.run_directory import RunDirectory
from llamaclust.model.loader import Model
from llamaclust.worker.devices import check_devices
from llamaclust.worker.machine import available_memory_bytes

_GRACE_S = 1.0
_INHERITED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_INHERITED_PREFIXES = ("LC_", "PYTHON", "GRPC_", "ASAN_", "TSAN_", "UBSAN_")


class LocalLauncher:
    """See `Launcher`. Call `start` from a thread that lives as long as the cluster: workers end with that thread."""

    def __init__(self, run: RunDirectory, logs: Path) -> None:
        self._run = run
        self._logs = logs
        self._processes: dict[str, Process] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def pids(self) -> Mapping[str, int]:
        return {name: process.pid for name, process in self._processes.items() if process.returncode is None}

    def check(self, workers: Sequence[WorkerSpec], model: Model) -> None:
        check_devices(((worker.device, worker.feature_level) for worker in workers), model)

    async def start(self, workers: Sequence[WorkerSpec], join: str, exited: Exited) -> None:
        for spec in workers:
            index = len(self._processes)
            process = await self._spawn(spec, join, self._run.worker(index))
            self._processes[spec.name] = process
            self._watches.append(asyncio.create_task(self._watch(spec.name, process, exited)))

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is still there a second later."""
        self._stopping = True
        self._signal(signal.SIGTERM)
        if self._watches:
            await asyncio.wait(self._watches, timeout=_GRACE_S)
            self._signal(signal.SIGKILL)
            await asyncio.wait(self._watches, timeout=_GRACE_S)

    def free_memory_bytes(self) -> int:
        """Of this machine, where all of them are."""
        return available_memory_bytes()

    def last_words(self, name: str) -> str:
        return last_words(self._log_file(name))

    def _log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def _spawn(self, spec: WorkerSpec, join: str, listen: str) -> Process:
        arguments = list(_arguments(spec, join, listen, self._run.token_file))
        descriptor = os.open(self._log_file(spec.name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "llamaclust.worker",
                *arguments,
                stdin=DEVNULL,
                stdout=descriptor,
                stderr=STDOUT,
                env=_environment(os.environ),
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    async def _watch(self, name: str, process: Process, exited: Exited) -> None:
        code = await process.wait()
        if not self._stopping:
            exited(name, describe_exit(code))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)  # `send_signal` would reap it before `_watch` hears of its end


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
        "--parent-pid": os.getpid(),
    }
    for option, value in options.items():
        if value is not None:
            yield from (option, str(value))


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: nothing that may hold a secret."""
    inherited = {
        name: value for name, value in variables.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return inherited | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's own threads, one a core otherwise, would only wait
