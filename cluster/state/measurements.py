"""Stores measured speeds, and the load of other programs during the measurements, in a state directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TypeVar

from pydantic import TypeAdapter

from llamaclust.cluster.state.directory import read_values, write_private
from llamaclust.core.profile import Profile
from llamaclust.core.this_machine import process_fields

Key = TypeVar("Key")
Value = TypeVar("Value")

_FILE = ".profiles.json"  # The file's name begins with a dot, so it cannot be a cluster's folder.
_STAT = Path("/proc/stat")
_PROC = Path("/proc")
_LEAST_S = 0.1
MAX_PROFILES = 128
"""Maximum number of profiles that are kept. Fingerprints are texts of the workers, so their number has no limit."""
_CPU_TIMES = slice(11, 15)


@dataclass(frozen=True, slots=True)
class OtherLoad:
    """Mean numbers of cores that other programs (`others`) and other virtual machines (`stolen`) used."""

    cores: int  # Number of cores that this process may use.
    others: float
    stolen: float

    @property
    def is_much(self) -> bool:
        return self.others + self.stolen > 0.1 * self.cores

    @property
    def text(self) -> str:
        stolen = f", other virtual machines {self.stolen:.1f}" if self.stolen >= 0.05 else ""
        return f"other programs used {self.others:.1f} of {self.cores} cores{stolen}"


@dataclass(frozen=True, slots=True)
class _Measured:
    other_load: OtherLoad | None = None


_PROFILES = TypeAdapter(dict[str, Profile])
_LOADS = TypeAdapter(dict[str, _Measured])


def disturbance(loads: Iterable[OtherLoad]) -> str | None:
    worst = max(loads, key=lambda load: load.others + load.stolen, default=None)
    if worst is None or not worst.is_much:
        return None
    return f"speeds were measured while {worst.text}: run `llamaclust measure` on an idle machine"


class CpuSeconds(NamedTuple):
    """CPU times since boot, in seconds, on this process's cores. `at` is the perf_counter time of the reading."""

    busy: float
    stolen: float
    own: float  # Seconds of this process and all its descendants.
    at: float


def other_load(before: CpuSeconds, after: CpuSeconds, cores: int) -> OtherLoad | None:
    busy, stolen, own, elapsed = (end - start for start, end in zip(before, after, strict=True))
    if elapsed < _LEAST_S:
        return None
    return OtherLoad(cores, max(0.0, busy - own) / elapsed, max(0.0, stolen) / elapsed)


class LoadMeter:
    def __init__(self) -> None:
        self._started = _read()

    def measure(self) -> OtherLoad | None:
        """Returns the load since this meter was created. Returns None in the first 0.1 s, or without /proc/stat."""
        before, after = self._started, _read()
        if before is None or after is None:
            return None
        return other_load(before, after, len(os.sched_getaffinity(0)))


def _read() -> CpuSeconds | None:
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return None
    names, tick = {f"cpu{core}" for core in os.sched_getaffinity(0)}, os.sysconf("SC_CLK_TCK")
    busy = stolen = 0
    for name, *values in map(str.split, lines):
        if name in names and len(values) >= 8:
            user, nice, system, _idle, _wait, interrupts, soft, steal = map(int, values[:8])
            busy, stolen = busy + user + nice + system + interrupts + soft, stolen + steal
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    below = sum(map(_ticks, _descendants(str(os.getpid()))))
    return CpuSeconds(busy / tick, stolen / tick, mine + below / tick, perf_counter())


def _descendants(pid: str) -> Iterator[str]:
    for children in (_PROC / pid / "task").glob("*/children"):
        found: list[str] = []
        with suppress(OSError):
            found = children.read_text().split()
        for child in found:
            yield child
            yield from _descendants(child)


def _ticks(pid: str) -> int:
    return sum(map(int, process_fields(pid)[_CPU_TIMES]))  # A process that has ended counts 0.


def newest(known: Mapping[Key, Value], used: Iterable[Key], most: int) -> dict[Key, Value]:
    """Returns the entries whose keys are in `used`, and the newest others until there are `most` in total."""
    kept = {key: known[key] for key in used if key in known}
    others = {key: value for key, value in known.items() if key not in kept}
    room = max(0, most - len(kept))
    return dict([*others.items()][max(0, len(others) - room) :]) | kept


def write_profiles(state_dir: Path, profiles: Mapping[str, Profile], load: OtherLoad | None = None) -> None:
    """Adds profiles to the stored profiles. `load` is the load by other programs while the profiles were measured."""
    loads = {**read_other_loads(state_dir), **dict.fromkeys(profiles, load)}
    kept = newest({**read_profiles(state_dir), **profiles}, profiles, MAX_PROFILES)
    values = {key: asdict(profile) | asdict(_Measured(loads.get(key))) for key, profile in kept.items()}
    write_private(state_dir / _FILE, json.dumps(values), is_synced=False)


def read_profiles(state_dir: Path) -> dict[str, Profile]:
    return read_values(state_dir / _FILE, _PROFILES)


def read_other_loads(state_dir: Path) -> dict[str, OtherLoad]:
    found = read_values(state_dir / _FILE, _LOADS)
    return {key: each.other_load for key, each in found.items() if each.other_load is not None}
