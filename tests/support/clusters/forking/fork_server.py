"""A process, started by `forks`, that imports a program's modules and forks processes that run it. These become
children of the requesting process, which is a subreaper for that time, and report their process ids."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOM_BYTES = 4096
"""Space for a forked process's command line, and for its state directory, in place of the server's."""
STATE_DIR = "LLAMACLUST_STATE_DIR"
WORKER_PROGRAM = "PYTHON_WORKER_PROGRAM"
"""The variable of a Python file that a process runs before its own program; workers inherit variables that begin with
PYTHON. In processes that are not forked, `sitecustomize` runs the file."""

IMPORTED = {
    "llamaclust": (
        "llamaclust.cli.app",
        "llamaclust.cli.up",
        "llamaclust.cli.worker",
        "llamaclust.cluster.front.app",
        "llamaclust.cluster.server.coordinator",
        "llamaclust.kernels.cpu.backend",
        "llamaclust.worker.main",
    ),
    "llamaclust.worker": ("llamaclust.kernels.cpu.backend", "llamaclust.worker.main"),
}
"""The modules that the server imports for each program."""
CHILDREN = (
    "llamaclust.model.chat.template_child",
    "llamaclust.model.grammars.checker_child",
    "llamaclust.model.images.child",
)
"""Programs of one module, without gRPC, whose processes have a limited address space."""

_MESSAGE_BYTES = 1 << 18
_CLONE_NEWNET = 0x40000000
_ARGUMENTS_FIELD = 48
"""The /proc/PID/stat field, from 1 on, of the command line's start; its end and the environment's bounds follow."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to run the program as `python -P -m` does."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    network: str | None = None
    """The name of a network namespace, as in `ip netns exec`."""


def main() -> None:
    """Serves requests until the socket's other end closes. Arguments: the program and the socket's descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for pytest
    place = _places()
    program = sys.argv[1].removeprefix("of=")  # tests find workers by this bare word
    if program in CHILDREN:
        importlib.import_module(program)
        del sys.modules[program]  # it is run as `__main__`
    else:
        _import(program)
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "only this thread would be there after a fork"  # noqa: PTH208
    asked = _serve(socket.socket(fileno=int(sys.argv[2])), program, place)
    if asked is not None:
        sys.argv = [program, *asked.arguments]
        sys.orig_argv = [sys.executable, "-P", "-m", *sys.argv]
        if WORKER_PROGRAM in os.environ:
            runpy.run_path(os.environ[WORKER_PROGRAM])
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _import(program: str) -> None:
    from llamaclust.wire.rpc.grpc_options import tune_grpc

    tune_grpc()
    for module in IMPORTED[program]:
        importlib.import_module(module)


def _serve(requests: socket.socket, program: str, place: tuple[int, int, int]) -> Asked | None:
    """Returns the request in a forked process; None in the server, at its end."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 3)
        if not message:
            return None
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            if os.fork() != 0:
                os._exit(0)
            while os.getppid() == parent:  # the parent ends at once
                os.sched_yield()
            asked = Asked(**json.loads(message))
            _become(asked, descriptors)
            _show([sys.executable, "-P", "-m", program, *asked.arguments], place)
            requests.send(str(os.getpid()).encode())
            requests.close()
            return asked
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(asked: Asked, descriptors: list[int]) -> None:
    os.setsid()
    os.chdir(asked.folder)
    if asked.network is not None:
        _enter(asked.network)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked.environment)
    time.tzset()


def _enter(network: str) -> None:
    namespace = os.open(f"/run/netns/{network}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns into {network}")
    os.close(namespace)


def _places() -> tuple[int, int, int]:
    """Returns the addresses of this process's command line, of its environment, and of the environment's end."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first = _ARGUMENTS_FIELD - 3  # the id and the name come before
    begin, _, middle, end = map(int, fields[first : first + 4])
    return begin, middle, end


def _show(words: list[str], place: tuple[int, int, int]) -> None:
    """Sets the command line and the state directory that process listings show."""
    begin, middle, end = place
    _write(begin, middle, "".join(f"{word}\0" for word in words))
    _write(middle, end, f"{STATE_DIR}={os.environ.get(STATE_DIR, '')}\0")


def _write(begin: int, end: int, text: str) -> None:
    shown = os.fsencode(text)
    assert len(shown) < end - begin
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, shown, len(shown))


if __name__ == "__main__":
    main()
