"""Emulates networks between workers on one machine, and slower cores, with a preloaded library (`emulated.cpp`)."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from llamaclust.core.errors import UsageError

_SETTINGS = struct.Struct("<qd")
_CALLER = "_native"


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Settings of links. Half of the round trip delays each direction. If `gbit_s` is 0, the rate has no limit."""

    round_trip_ms: float = 0.0
    gbit_s: float = 0.0

    def encode(self) -> bytes:
        return _SETTINGS.pack(round(self.round_trip_ms / 2 * 1e6), 8 / self.gbit_s if self.gbit_s else 0.0)


@dataclass(slots=True)
class Emulation:
    folder: Path
    library: Path = field(init=False)
    _settings: mmap.mmap = field(init=False)

    @classmethod
    def build(cls, folder: Path) -> Self:
        made = cls(folder)
        made.library = compiled("emulated.cpp", folder)
        made._path.write_bytes(LinkSpeed().encode())
        with made._path.open("r+b") as file:
            made._settings = mmap.mmap(file.fileno(), 0)
        return made

    @property
    def _path(self) -> Path:
        return self.folder / "link"

    def set(self, speed: LinkSpeed) -> None:
        self._settings[:] = speed.encode()

    def prefix(self, core: int, speed: float = 1.0) -> tuple[str, ...]:
        """Returns the words before a command that must run on `core`. A `speed` below 1 emulates a slower core."""
        words = [f"{name}={value}" for name, value in self.variables(speed).items()]
        return ("taskset", "-c", str(core), "env", *words)

    def variables(self, speed: float = 1.0, caller: str = _CALLER) -> dict[str, str]:
        places = {"LD_PRELOAD": str(self.library), "EMULATED_LINK": str(self._path), "EMULATED_CALLER": caller}
        return {**places, "EMULATED_SPEED": str(speed)}


def compiler() -> str | None:
    """Returns the path of the first C++ compiler among $CXX (or c++), g++ and clang++, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def compiled(name: str, folder: Path) -> Path:
    source, library = Path(__file__).with_name(name), (folder / name).with_suffix(".so")
    if library.exists():
        return library
    if (command := compiler()) is None:
        raise UsageError("no C++ compiler was found; install g++ or clang++, or set CXX")
    words = [command, "-std=c++20", "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"{source}: {done.stderr.strip()}")
    return library
