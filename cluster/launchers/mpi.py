"""The coordinator's side of an MPI job, whose ranks start the workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from collections.abc import Sequence
from dataclasses import replace

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.base import Exited
from llamaclust.cluster.launchers.mpi_messages import (
    EndWorker,
    Message,
    RankLost,
    StartWorker,
    WorkerEnded,
    from_bytes,
    to_bytes,
)
from llamaclust.cluster.launchers.static import RestartingLauncher
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Report
from llamaclust.core.addresses import ANYWHERE, joined_address, split_address
from llamaclust.core.errors import UsageError
from llamaclust.core.interfaces import own_addresses
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.worker.settings import WorkerSettings

_GRACE_S = 1.0


class MpiLauncher(RestartingLauncher):
    """Starts workers through the ranks of an MPI job. Sends commands to rank 0 over a socket."""

    def __init__(self, config: ClusterConfig, folder: ClusterDir, report: Report) -> None:
        super().__init__(config, folder, report)
        self.coordinator_s = 0.0  # Workers end with the job, so they do not wait for another coordinator.
        self._orders: dict[str, StartWorker] = {}
        self._running: dict[str, asyncio.Event] = {}  # Events that are set when the worker's process has ended.
        self._lost: set[str] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._tasks = TaskSet()

    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        reader, self._writer = await asyncio.open_connection(sock=_own_rank())
        host, port = split_address(await self.open(join))
        hosts = own_addresses() if host in ANYWHERE else [host]
        addresses = tuple(joined_address(host, port) for host in hosts)
        assert self.authority is not None
        token = self.authority.token.text
        for rank, (worker, config) in enumerate(zip(workers, self._config.workers, strict=True)):
            settings = replace(worker, threads=config.threads, token=token)
            self._orders[worker.name] = StartWorker(rank, settings.to_json(), addresses)
            self._start(worker.name)
        self._tasks.start(self._receive(reader, exited)).add_done_callback(_end_without_rank)

    async def stop(self) -> None:
        self._restarts.end()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not await self._ended(_GRACE_S):
                for name in self._running:
                    self._send(EndWorker(self._orders[name].rank, number))
        await self._ended(_GRACE_S)
        self._tasks.cancel()
        if self._writer is not None:
            self._writer.close()
        await super().stop()

    async def end(self, name: str) -> None:
        running = self._running.get(name)
        if running is None or running.is_set() or name in self._lost:
            return
        self._send(EndWorker(self._orders[name].rank, signal.SIGKILL))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.wait(), _GRACE_S)

    def _start(self, name: str) -> None:
        self._running[name] = asyncio.Event()
        self._send(self._orders[name])

    def _send(self, message: Message) -> None:
        assert self._writer is not None
        self._writer.write(to_bytes(message))

    async def _ended(self, within_s: float) -> bool:
        waits = [event.wait() for name, event in self._running.items() if name not in self._lost]
        try:
            await asyncio.wait_for(asyncio.gather(*waits), within_s)
        except TimeoutError:
            return False
        return True

    async def _receive(self, reader: asyncio.StreamReader, exited: Exited) -> None:
        names = {order.rank: name for name, order in self._orders.items()}
        while line := await _line(reader):
            message = from_bytes(line)
            if isinstance(message, WorkerEnded):
                name = names[message.rank]
                self._last_errors[name] = message.last_error
                self._running[name].set()
                exited(name, message.how)
                self._tasks.start(self._restart(name, message.how))
            elif isinstance(message, RankLost):
                name = names[message.rank]
                self._lost.add(name)
                exited(name, f"its rank {message.rank} is gone")
                self._restarts.give_up(name, f"its rank {message.rank} is gone, and MPI starts no other rank")

    async def _restart(self, name: str, how: str) -> None:
        if await self._restarts.may_restart(name, how) and name not in self._lost:
            self._start(name)


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ConnectionError:
        return b""


def _end_without_rank(receiving: asyncio.Task[None]) -> None:
    if not receiving.cancelled():
        os.kill(os.getpid(), signal.SIGTERM)


def _own_rank() -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(0).st_mode):
        raise UsageError("launcher mpi must be started by mpirun; run: mpirun -n WORKERS llamaclust up FILE")
    return socket.socket(fileno=os.dup(0))
