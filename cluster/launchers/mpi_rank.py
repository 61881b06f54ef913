"""A rank of an MPI job, which starts and watches one worker. Rank 0 also starts the coordinator."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.child import Child
from llamaclust.cluster.launchers.mpi_messages import (
    EndWorker,
    Leave,
    Machine,
    Message,
    RankLost,
    StartWorker,
    WorkerEnded,
    from_bytes,
    to_bytes,
)
from llamaclust.cluster.launchers.worker_process import describe_exit
from llamaclust.cluster.membership.log_tail import recent_error
from llamaclust.cluster.state.directory import ClusterDir, open_log
from llamaclust.cluster.state.log_files import limit_log
from llamaclust.core.addresses import split_address
from llamaclust.core.errors import LlamaclustError, UsageError, WorkerError
from llamaclust.core.this_machine import machine_id
from llamaclust.wire.security.token import JoinToken
from llamaclust.worker.devices.cores import physical_cores
from llamaclust.worker.enrolment import pinned
from llamaclust.worker.settings import WorkerSettings

RANKED = "--ranked"
_MPI_PREFIXES = ("OMPI_", "OPAL_", "ORTE_", "PMIX_", "PMI_", "PRTE_", "MPI", "HYDRA_", "HYDI_", "I_MPI_", "MV2_")
_POLL_S = 0.01
_LOG_CHECK_S = 0.5
_CONNECT_S = 2.0
_REPORT_S = 60.0
_DRAIN_S = 40.0
"""Seconds that a rank continues after SIGTERM, so that requests can finish."""
_INSTALL = (
    "launcher mpi needs mpi4py and MPI: pip install 'llamaclust[mpi]', and install openmpi or mpich if there is no MPI"
)


class RankLostError(WorkerError):
    """A message to or from a rank failed. The job continues without this rank."""


def run_ranks(config: ClusterConfig, arguments: Sequence[str]) -> int:
    """Runs one rank of `mpirun -n WORKERS llamaclust up ARGUMENTS`. Returns the exit code of the rank."""
    ranks = _Ranks()
    rank = _Rank(ranks, config)
    signal.signal(signal.SIGTERM, rank.on_signal)
    signal.signal(signal.SIGINT, rank.on_signal)
    try:
        return _Coordinator(rank, config, arguments).run() if ranks.own == 0 else rank.run()
    except LlamaclustError:
        raise
    except Exception:
        # Prevents `leave` from waiting for the other ranks, which wait for this rank.
        ranks.lost.add(ranks.own)
        logging.getLogger(__name__).exception("rank %d ends the job", ranks.own)
        ranks.abort()
        raise
    finally:
        ranks.leave()


class _Ranks:
    def __init__(self) -> None:
        try:
            import mpi4py

            mpi4py.rc.finalize = False  # `leave` finalizes MPI.
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"{_INSTALL}: {str(error).strip().splitlines()[0]}") from error
        self._mpi: Any = MPI
        self._world: Any = MPI.COMM_WORLD
        self.own: int = self._world.Get_rank()
        self.count: int = self._world.Get_size()
        self.lost: set[int] = set()
        self.is_complete = True  # False if rank 0 has reported that a rank is lost.

    def send(self, message: Message, rank: int) -> None:
        with self._losing(rank):
            self._world.Send([bytearray(to_bytes(message)), self._mpi.BYTE], dest=rank)

    def received(self, rank: int) -> Iterator[Message]:
        with self._losing(rank):
            status = self._mpi.Status()
            while self._world.Iprobe(source=rank, status=status):
                data = bytearray(status.Get_count(self._mpi.BYTE))
                self._world.Recv([data, self._mpi.BYTE], source=rank)
                yield from_bytes(bytes(data))

    def abort(self) -> None:
        self._world.Abort(1)

    def leave(self) -> None:
        """Finalizes MPI. Does nothing if a rank is lost, because MPI would wait forever for this rank."""
        if self.is_complete and not self.lost:
            self._mpi.Finalize()

    @contextmanager
    def _losing(self, rank: int) -> Iterator[None]:
        try:
            yield
        except self._mpi.Exception as error:
            self.lost.add(rank)
            raise RankLostError(f"rank {rank} is gone: {error}") from error


class _Rank:
    def __init__(self, ranks: _Ranks, config: ClusterConfig) -> None:
        self.ranks = ranks
        self.is_signalled = False  # True after a signal to end.
        self.ends: queue.SimpleQueue[WorkerEnded] = queue.SimpleQueue()
        self._folder = ClusterDir(config.state_dir / config.name)
        self._child: Child | None = None
        self._log: Path | None = None
        self._log_check_s = 0.0  # Time of the next check of the log's size.
        self._leave_s = math.inf  # Time at which the rank leaves, by the monotonic clock.

    def on_signal(self, number: int, frame: object) -> None:
        """Makes the rank leave after `_DRAIN_S` seconds, or earlier if the coordinator orders it."""
        if not self.is_signalled:
            self.is_signalled = True
            self._leave_s = time.monotonic() + _DRAIN_S

    def run(self) -> int:
        self.ranks.send(Machine(self.ranks.own, machine_id()), 0)
        while time.monotonic() < self._leave_s:
            try:
                for message in self.ranks.received(0):
                    if isinstance(message, Leave):
                        self.kill()
                        self.ranks.is_complete = message.is_complete
                        return 0
                    self.handle(message)
                for end in self.update():
                    self.ranks.send(end, 0)
            except RankLostError:
                break
            self._limit_log()
            time.sleep(_POLL_S)
        self.kill()
        return 1

    def _limit_log(self) -> None:
        if self._log is not None and time.monotonic() >= self._log_check_s:
            limit_log(self._log)
            self._log_check_s = time.monotonic() + _LOG_CHECK_S

    def handle(self, message: Message) -> None:
        if isinstance(message, StartWorker):
            try:
                self._start(message)
            except (OSError, LlamaclustError) as error:
                self.ends.put(WorkerEnded(message.rank, f"it cannot be started: {error}", ""))
        elif isinstance(message, EndWorker) and self._child is not None:
            self._child.signal(signal.Signals(message.number))

    def update(self) -> Iterator[WorkerEnded]:
        while not self.ends.empty():
            yield self.ends.get()

    def kill(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    def _start(self, order: StartWorker) -> None:
        settings = WorkerSettings.from_json(order.settings)
        self._folder.create()
        self._log = log = self._folder.log_file(settings.name)
        start_bytes = log.stat().st_size if self._child is not None else 0
        threads = settings.threads or _share(order.sharers)
        settings = replace(settings, threads=threads, join=_reachable(order.addresses, settings.token))

        def ended(code: int) -> None:
            error = recent_error(log, start_bytes) if code else ""
            self.ends.put(WorkerEnded(order.rank, describe_exit(code), error))

        with os.fdopen(open_log(log, anew=self._child is None), "ab") as file:
            self._child = Child(settings, ended, file)


def _share(sharers: int) -> int:
    is_bound = len(os.sched_getaffinity(0)) < (os.cpu_count() or 1)
    return physical_cores() if is_bound else max(1, physical_cores() // sharers)


class _Coordinator:
    def __init__(self, rank: _Rank, config: ClusterConfig, arguments: Sequence[str]) -> None:
        self._rank = rank
        self._config = config
        self._arguments = arguments
        self._partial = b""  # Start of an incomplete message from the coordinator.
        self._unsent = b""  # Bytes for the coordinator that its socket has not accepted yet.
        self._machines = {0: machine_id()}  # Boot id of the machine, by rank.

    def run(self) -> int:
        ranks = self._rank.ranks
        try:
            if ranks.count != (wanted := len(self._config.workers)):
                what = f"{wanted} workers need {wanted} ranks, but there are {ranks.count}"
                raise UsageError(f"launcher mpi: {what}; run: mpirun -n {wanted} llamaclust up FILE")
            return self._relay_until_exit() if self._wait_for_ranks() else 128 + signal.SIGTERM
        finally:
            self._rank.kill()
            for other in self._others():
                with suppress(RankLostError):
                    ranks.send(Leave(other, is_complete=not ranks.lost), other)

    def _wait_for_ranks(self) -> bool:
        """Waits until all ranks have reported. Returns False after a signal. Raises WorkerError after a minute."""
        ranks, end_s = self._rank.ranks, time.monotonic() + _REPORT_S
        while missing := set(range(ranks.count)) - self._machines.keys():
            if self._rank.is_signalled or time.monotonic() > end_s:
                ranks.lost |= missing  # The missing ranks would not take part in finalizing MPI.
                if self._rank.is_signalled:
                    return False
                raise WorkerError(f"ranks {sorted(missing)} have not reported within {_REPORT_S:g} s")
            for other in self._others():
                for message in ranks.received(other):
                    assert isinstance(message, Machine)
                    self._machines[other] = message.boot_id
            time.sleep(_POLL_S)
        return True

    def _others(self) -> list[int]:
        ranks = self._rank.ranks
        return [rank for rank in range(1, ranks.count) if rank not in ranks.lost]

    def _relay_until_exit(self) -> int:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = _spawn(self._arguments, theirs)
            ours.setblocking(False)
            is_passed_on = False
            while (code := process.poll()) is None:
                if self._rank.is_signalled and not is_passed_on:
                    is_passed_on = True
                    process.terminate()
                self._relay(ours)
                time.sleep(_POLL_S)
        return code if code >= 0 else 128 - code

    def _relay(self, to_coordinator: socket.socket) -> None:
        for message in self._orders(to_coordinator):
            if isinstance(message, StartWorker):
                sharers = list(self._machines.values()).count(self._machines[message.rank])
                message = replace(message, sharers=sharers)
            if message.rank == 0:
                self._rank.handle(message)
            elif message.rank not in self._rank.ranks.lost:
                with suppress(RankLostError):  # `received` reports the lost rank below.
                    self._rank.ranks.send(message, message.rank)
        update: list[Message] = [*self._rank.update()]
        for other in self._others():
            try:
                update += self._rank.ranks.received(other)
            except RankLostError:
                update.append(RankLost(other))
        self._unsent += b"".join(map(to_bytes, update))
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # The coordinator is busy or is ending.
            while self._unsent:
                self._unsent = self._unsent[to_coordinator.send(self._unsent) :]

    def _orders(self, coordinator: socket.socket) -> list[Message]:
        with suppress(BlockingIOError, ConnectionResetError):
            while data := coordinator.recv(1 << 16):
                self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        return [from_bytes(line) for line in lines]


def _spawn(arguments: Sequence[str], to_rank: socket.socket) -> subprocess.Popen[bytes]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(_MPI_PREFIXES)}
    command = [sys.executable, "-P", "-m", "llamaclust", "up", *arguments, RANKED]
    # Signals to the rank's process group must not reach the coordinator, so it gets a session of its own.
    return subprocess.Popen(command, stdin=to_rank.fileno(), env=variables, start_new_session=True)


def _reachable(addresses: Sequence[str], token: str) -> str:
    """Returns the first address at which the coordinator answers, or `addresses[0]` if it answers at none of them."""
    pin = JoinToken.parse(token)
    assert pin is not None, "the coordinator sent an invalid token"
    for address in addresses if len(addresses) > 1 else ():
        with suppress(LlamaclustError, TimeoutError):
            asyncio.run(asyncio.wait_for(pinned(*split_address(address), pin, address), _CONNECT_S))
            return address
    return addresses[0]
