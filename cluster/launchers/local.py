from __future__ import annotations

import asyncio
import logging
import os
import signal
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from llamaclust.cluster.launchers.arrivals import Shortfall
from llamaclust.cluster.launchers.base import Exited, GaveUp, Launcher
from llamaclust.cluster.launchers.restarts import RestartPolicy
from llamaclust.cluster.launchers.run_directory import RunDirectory
from llamaclust.cluster.launchers.worker_process import (
    describe_exit,
    worker_command,
    worker_environment,
    worker_input,
)
from llamaclust.cluster.membership.log_tail import recent_error
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.state.directory import open_log
from llamaclust.core.errors import DeadlineError, LlamaclustError
from llamaclust.model.loader import Model
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.devices.devices import check_devices
from llamaclust.worker.devices.system_info import available_memory_bytes
from llamaclust.worker.settings import WorkerSettings

_log = logging.getLogger(__name__)

_GRACE_S = 1.0
_JOIN_S = 60.0
_KILLED_S = 20.0


class LocalLauncher(Launcher):
    """Starts workers on this machine. The kernel ends a worker when the thread that called `start` ends."""

    def __init__(self, run: RunDirectory, logs: Path) -> None:
        self.listen = run.coordinator
        self.credentials = run.token
        self._run = run
        self._logs = logs
        self._processes: dict[str, Process] = {}
        # Size of the log in bytes when the worker's current process started.
        self._log_starts: dict[str, int] = {}
        self._sockets = count()
        self._watches: list[asyncio.Task[None]] = []
        self._restarts = RestartPolicy()
        self._is_stopping = False

    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        check_devices(((worker.device, worker.feature_level) for worker in workers), model)

    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        for settings in workers:
            joining = replace(settings, join=join, token=self._run.token.value)
            await self._spawn(joining)
            self._watches.append(asyncio.create_task(self._watch(joining, exited)))

    async def joined(self, registry: Registry, shortfall: Shortfall) -> None:
        await registry.wait_for(tuple(self._processes), _JOIN_S)

    def restarting(self, gave_up: GaveUp) -> AbstractContextManager[None]:
        return self._restarts.on(gave_up)

    def reset_restarts(self) -> None:
        self._restarts.reset_restarts()

    async def end(self, name: str) -> None:
        """Kills the process with SIGKILL, because a lost worker may ignore other signals."""
        process = self._processes.get(name)
        if process is not None and process.returncode is None:
            _kill(process, signal.SIGKILL)
            try:
                async with deadline(f"the end of worker {name}", _KILLED_S):
                    await process.wait()
            except DeadlineError:
                _log.warning("worker %s (pid %d) has not ended %g s after SIGKILL", name, process.pid, _KILLED_S)

    async def stop(self) -> None:
        self._is_stopping = True
        self._restarts.end()
        self._signal(signal.SIGTERM)
        if self._watches:
            await asyncio.wait(self._watches, timeout=_GRACE_S)
            self._signal(signal.SIGKILL)
            await asyncio.wait(self._watches, timeout=_GRACE_S)

    def free_memory_bytes(self) -> int:
        return available_memory_bytes()

    def last_error(self, name: str, silent_s: float) -> str:
        return recent_error(self._log_file(name), self._log_starts.get(name, 0), silent_s)

    def _log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def _spawn(self, settings: WorkerSettings) -> None:
        name = settings.name
        log = open_log(self._log_file(name), anew=name not in self._processes)
        try:
            self._log_starts[name] = os.fstat(log).st_size
            self._processes[name] = process = await asyncio.create_subprocess_exec(
                *worker_command(settings),
                stdin=PIPE,
                stdout=log,
                stderr=STDOUT,
                env=worker_environment(os.environ),
                start_new_session=True,
            )
        finally:
            os.close(log)
        assert process.stdin is not None
        listen = self._run.worker(next(self._sockets))
        process.stdin.write(worker_input(replace(settings, listen=listen)))
        process.stdin.close()

    async def _watch(self, settings: WorkerSettings, exited: Exited) -> None:
        while True:
            how = describe_exit(await self._processes[settings.name].wait())
            if self._is_stopping:
                return
            exited(settings.name, how)
            if not await self._restart(settings, how):
                return
            if self._is_stopping:
                _kill(self._processes[settings.name], signal.SIGKILL)

    async def _restart(self, settings: WorkerSettings, how: str) -> bool:
        while await self._restarts.may_restart(settings.name, how):
            try:
                await self._spawn(settings)
            except (OSError, LlamaclustError) as error:  # The cause may be temporary, so the start is tried again.
                how = f"it cannot be started: {error}"
            else:
                return True
        return False

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                _kill(process, number)


def _kill(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        # `send_signal` could reap the process before `_watch` sees its end.
        os.kill(process.pid, number)
