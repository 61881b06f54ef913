"""Finds the processes of a cluster, and sends signals to them only. Process id and start time identify a process."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaclust.core.addresses import AddressError, split_address
from llamaclust.core.this_machine import process_fields

_PROC = Path("/proc")
_STATE, _PARENT, _START = 0, 1, 19  # Indexes of fields in /proc/PID/stat, counted after the process name.
_LISTENING = "0A"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this user. A later process with the same id has another start time."""

    pid: int
    start_time: int  # Clock ticks from the machine's start to the process's start.

    @property
    def is_running(self) -> bool:
        fields = process_fields(self.pid)
        return bool(fields) and int(fields[_START]) == self.start_time and fields[_STATE] not in ("Z", "X")

    def send(self, number: signal.Signals) -> bool:
        """Sends a signal. Returns False if the process has ended."""
        with suppress(ProcessLookupError):
            # A pidfd makes sure that no later process with the same id gets the signal.
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.is_running:
                    signal.pidfd_send_signal(descriptor, number)
                    return True
            finally:
                os.close(descriptor)
        return False

    def catches(self, number: signal.Signals) -> bool:
        """Returns True if the process handles the signal."""
        with suppress(OSError):
            lines = (_PROC / str(self.pid) / "status").read_text().splitlines()
            caught = next((line for line in lines if line.startswith("SigCgt:")), "SigCgt: 0")
            return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
        return False

    def limit_files(self, most_bytes: int) -> int | None:
        """Limits the size of files that the process and its later children can write. Returns the previous limit, or
        None if the process has ended."""
        if not self.is_running:
            return None
        with suppress(ProcessLookupError):
            before, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
            is_allowed = hard == resource.RLIM_INFINITY or 0 <= most_bytes <= hard
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (most_bytes if is_allowed else hard, hard))
            return before
        return None

    def children(self) -> Iterator[Process]:
        for folder in _PROC.iterdir():
            if folder.name.isdecimal() and (fields := process_fields(folder.name)) and int(fields[_PARENT]) == self.pid:
                yield Process(int(folder.name), int(fields[_START]))


def local_worker(worker: Mapping[str, Any], coordinator_pid: int) -> Process | None:
    """Returns the process of a worker that the coordinator started. `worker` is an entry of `GET /cluster`."""
    process = _own_process(worker["pid"])
    if process is None or not _is_command(_command_line(process.pid), ["-m", "llamaclust.worker", "--name"], worker):
        return None
    fields = process_fields(process.pid)
    return process if fields and int(fields[_PARENT]) == coordinator_pid else None


def joined_worker(worker: Mapping[str, Any]) -> Process | None:
    """Returns the process of a worker that `llamaclust worker` started, or None if it runs on another machine."""
    process = _own_process(worker["pid"])
    if process is None:
        return None
    words = _command_line(process.pid)
    is_worker = "worker" in words and any(Path(word).name == "llamaclust" for word in words[: words.index("worker")])
    with suppress(AddressError):  # The address may be a Unix socket.
        host, port = split_address(worker["address"])
        if is_worker and port in listening_ports(process.pid) and is_here(host):
            return process
    return None


def coordinator(pid: int, start_ticks: int) -> Process | None:
    """Returns the coordinator's process, or None if the id belongs to another process."""
    process = _own_process(pid)
    if process is None or process.start_time != start_ticks:
        return None
    words = _command_line(pid)
    return process if "up" in words and any(Path(word).name == "llamaclust" for word in words) else None


def _own_process(pid: int) -> Process | None:
    try:
        is_own = (_PROC / str(pid)).stat().st_uid == os.getuid()
    except OSError:
        return None
    fields = process_fields(pid)
    return Process(pid, int(fields[_START])) if is_own and fields else None


def _command_line(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _is_command(words: Sequence[str], command: Sequence[str], worker: Mapping[str, Any]) -> bool:
    wanted = [*command, worker["name"]]
    return any(list(words[i : i + len(wanted)]) == wanted for i in range(len(words)))


def is_here(host: str) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def listening_ports(pid: int) -> frozenset[int]:
    folder, ports = _PROC / str(pid), {}
    with suppress(OSError):
        for name in ("tcp", "tcp6"):
            for line in (folder / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                local, state = fields[1], fields[3]
                if state == _LISTENING:
                    ports[f"socket:[{fields[9]}]"] = int(local.rpartition(":")[2], 16)
        return frozenset(ports[name] for link in (folder / "fd").iterdir() if (name := str(link.readlink())) in ports)
    return frozenset()


def is_in_our_network(pid: int) -> bool:
    with suppress(OSError):
        return (_PROC / str(pid) / "ns/net").readlink() == (_PROC / "self/ns/net").readlink()
    return False
