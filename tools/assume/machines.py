"""Machines as a user describes them: "3x16GB@40GB/s, 1Gbit" as values."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llamaclust.core.errors import UsageError

MAX_MACHINES = 64
MAX_GPUS_EACH = 8
MAX_MEMORY_TIB = 1024
"""Of a processor or a GPU: bytes of all machines together are far from what 64 bits hold."""
EXAMPLE = "3x16GB@40GB/s,1Gbit"
GPU_EXAMPLE = "64GB@60GB/s + 24GB@900GB/s gpu"

_GIB = 1 << 30
_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_GROUP = re.compile(
    rf"(?:(?P<count>\d{{1,4}})\s*[xX*]\s*)?(?P<memory>{_NUMBER})\s*(?P<unit>[GT])i?B?"
    rf"\s*@\s*(?P<read>{_NUMBER})\s*GB/s"
    rf"(?:\s*/\s*(?P<threads>\d{{1,4}})|\s*@\s*(?P<tops>{_NUMBER})\s*TOPS)?(?P<gpu>\s*gpu)?",
    re.IGNORECASE,
)
_LINK = re.compile(rf"(?P<rate>{_NUMBER})\s*(?P<unit>[MG])(?:bit(?:/s)?|bps)", re.IGNORECASE)
_ROUND_TRIP = re.compile(rf"(?P<time>{_NUMBER})\s*(?P<unit>ms|us|µs)", re.IGNORECASE)
_TERAOPS_MACS = 0.5e12
"""A multiply-accumulate is two operations."""


@dataclass(frozen=True, slots=True)
class Device:
    """Memory, the bandwidth from it, and 8-bit multiply-accumulates a second, where they are given."""

    memory_bytes: int
    read_bytes_s: float
    macs_s: float | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor with its memory, and GPUs."""

    cpu: Device
    gpus: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """Between all machines; None where it is not given."""

    bits_s: float | None = None
    round_trip_s: float | None = None


@dataclass(frozen=True, slots=True)
class Assumed:
    """Machines in the order in which they are written."""

    machines: tuple[Machine, ...]
    network: Network = Network()


class _Reader:
    """The text and how far it has been read."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._skip()

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The match at this place, behind which reading goes on."""
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
            self._skip()
        return found

    def takes(self, character: str) -> bool:
        return self.take(re.compile(re.escape(character))) is not None

    def error(self, wanted: str, at: int | None = None) -> UsageError:
        place = self.at if at is None else at
        rest = self.text[place : place + 20]
        found = f"{rest!r} at character {place + 1}" if rest.strip() else f"the end at character {place + 1}"
        return UsageError(f"--assume: {wanted}, found {found}; for example --assume {EXAMPLE!r}")

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1


def parse_machines(text: str) -> Assumed:
    """`[Nx]MEMORY@BANDWIDTH[/THREADS or @TOPS][ gpu]`, joined by +, then `, SPEED[, ROUND TRIP]` of the network.

    A `gpu` group is N GPUs in each machine of the group before it. UsageError names the place of a mistake.
    """
    reader = _Reader(text)
    groups: list[list[Machine]] = []
    while True:
        _add_group(groups, reader)
        if not reader.takes("+"):
            break
    network = _network(reader)
    if reader.at < len(reader.text):
        raise reader.error('expected "+" and further machines, or "," and the network')
    return Assumed(tuple(machine for group in groups for machine in group), network)


def _add_group(groups: list[list[Machine]], reader: _Reader) -> None:
    begun = reader.at
    found = reader.take(_GROUP)
    if found is None:
        raise reader.error("expected machines as COUNTxMEMORY@BANDWIDTH", begun)
    count, device = int(found["count"] or 1), _device(found)
    if not count or not device.memory_bytes or not device.read_bytes_s or device.macs_s == 0 or device.threads == 0:
        raise reader.error("expected numbers above 0", begun)
    if device.memory_bytes > MAX_MEMORY_TIB * 1024 * _GIB:
        raise reader.error(f"expected {MAX_MEMORY_TIB} TB of memory at most", begun)
    if not found["gpu"]:
        if sum(map(len, groups)) + count > MAX_MACHINES:
            raise reader.error(f"expected {MAX_MACHINES} machines at most", begun)
        groups.append([Machine(device)] * count)
        return
    if not groups:
        raise reader.error(f"expected the machine of a GPU before it, as in {GPU_EXAMPLE!r}", begun)
    if device.threads is not None:
        raise reader.error("expected @TOPS: a GPU has no threads", begun)
    gpus = (*groups[-1][0].gpus, *((device,) * min(count, MAX_GPUS_EACH + 1)))
    if len(gpus) > MAX_GPUS_EACH:
        raise reader.error(f"expected {MAX_GPUS_EACH} GPUs a machine at most", begun)
    groups[-1] = [replace(machine, gpus=gpus) for machine in groups[-1]]


def _device(found: re.Match[str]) -> Device:
    scale = _GIB if found["unit"].upper() == "G" else _GIB << 10
    return Device(
        memory_bytes=int(float(found["memory"]) * scale),
        read_bytes_s=float(found["read"]) * 1e9,
        macs_s=None if found["tops"] is None else float(found["tops"]) * _TERAOPS_MACS,
        threads=None if found["threads"] is None else int(found["threads"]),
    )


def _network(reader: _Reader) -> Network:
    rate = round_trip = None
    if reader.takes(","):
        begun = reader.at
        found = reader.take(_LINK)
        if found is None:
            raise reader.error("expected the network's speed as 1Gbit or 100Mbit")
        rate = float(found["rate"]) * (1e9 if found["unit"].upper() == "G" else 1e6)
        if not rate:
            raise reader.error("expected numbers above 0", begun)
    if rate is not None and reader.takes(","):
        found = reader.take(_ROUND_TRIP)
        if found is None:
            raise reader.error("expected the network's round trip as 0.3ms")
        round_trip = float(found["time"]) * (1e-3 if found["unit"].lower() == "ms" else 1e-6)
    return Network(rate, round_trip)
