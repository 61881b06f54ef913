"""A network between workers on one machine, and members slower than its cores, by the preloaded `emulated.cpp`."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring.compiler import compiler

from llamaclust.core.errors import UsageError

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "emulated.cpp"
_EXCHANGE = _FOLDER / "raw_exchange.cpp"
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC")
_SETTINGS = struct.Struct("<qd")
_CALLER = "_native"
_SIDE = """
import sys
sys.path.insert(0, sys.argv[1])
from emulation import exchange
exchange(sys.argv[2], int(sys.argv[3]))
"""
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Half of the round trip is added to each way; `gbit_s` is the rate at which a worker receives, 0: no limit."""

    round_trip_ms: float = 0.0
    gbit_s: float = 0.0

    def encode(self) -> bytes:
        return _SETTINGS.pack(round(self.round_trip_ms / 2 * 1e6), 8 / self.gbit_s if self.gbit_s else 0.0)


@dataclass(slots=True)
class Emulation:
    """Links of all processes that are started with the words of `prefix`."""

    folder: Path
    library: Path = field(init=False)
    _settings: mmap.mmap = field(init=False)

    @classmethod
    def build(cls, folder: Path) -> Self:
        """UsageError where it cannot be built."""
        made = cls(folder)
        made.library = _compiled(_LIBRARY, folder / "emulated.so")
        made._path.write_bytes(LinkSpeed().encode())
        with made._path.open("r+b") as file:
            made._settings = mmap.mmap(file.fileno(), 0)
        return made

    @property
    def _path(self) -> Path:
        return self.folder / "link"

    def set(self, speed: LinkSpeed) -> None:
        self._settings[:] = speed.encode()

    def prefix(self, core: int, speed: float = 1.0, caller: str = _CALLER) -> tuple[str, ...]:
        """Words before a command that runs it on a core. A `speed` below 1 is that of a slower core."""
        words = [f"{name}={value}" for name, value in self.variables(speed, caller).items()]
        return ("taskset", "-c", str(core), "env", *words)

    def variables(self, speed: float = 1.0, caller: str = _CALLER) -> dict[str, str]:
        """The environment of a process that has such links."""
        places = {"LD_PRELOAD": str(self.library), "EMULATED_LINK": str(self._path), "EMULATED_CALLER": caller}
        return {**places, "EMULATED_SPEED": str(speed)}

    def exchange_us(self, cores: Sequence[int], count: int = 200) -> float:
        """The median time of an exchange of 16 KiB between two processes: what the links of members are made of."""
        library = _compiled(_EXCHANGE, self.folder / "raw_exchange.so")
        command = [sys.executable, "-c", _SIDE, str(_FOLDER), str(library), str(count)]
        ends = socket.create_server(("127.0.0.1", 0))
        with ends:
            second = socket.create_connection(ends.getsockname())
            first, _ = ends.accept()
        with first, second:
            sides = [
                subprocess.Popen(
                    [*self.prefix(core, caller=library.name), *command],
                    stdin=end.fileno(),
                    stdout=subprocess.PIPE,
                )
                for core, end in zip(cores, (first, second), strict=True)
            ]
            answers = [side.communicate(timeout=_END_S)[0] for side in sides]
        return float(median(json.loads(answers[0]))) / 1e3


def _compiled(source: Path, library: Path) -> Path:
    if library.exists():
        return library
    if (command := compiler()) is None:
        raise UsageError("no C++ compiler found")
    words = [command, *_FLAGS, str(source), "-o", str(library), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"{source}: {done.stderr.strip()}")
    return library


def exchange(library: str, count: int) -> None:
    """Exchanges bytes over the socket on standard input, and prints the nanoseconds of each time."""
    n_bytes, warm = 1 << 14, 20
    took, end = (ctypes.c_int64 * (count + warm))(), socket.socket(fileno=os.dup(0))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    own, theirs = ctypes.create_string_buffer(n_bytes), ctypes.create_string_buffer(n_bytes)
    function = ctypes.CDLL(library).raw_exchange
    if number := function(end.fileno(), own, theirs, ctypes.c_int64(n_bytes), count + warm, took):
        raise OSError(number, os.strerror(number))
    print(json.dumps([*took][warm:]))
