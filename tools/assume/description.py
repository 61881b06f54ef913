"""Parses descriptions of machines, such as "3x16GB@40GB/s, 1Gbit" or "2 x 16 GB @ DDR3 + 8 GB"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from llamaclust.core.errors import UsageError
from llamaclust.tools.assume.gpu_models import GPU_MODELS, find_gpu, similar_gpus
from llamaclust.tools.assume.machines import (
    EXAMPLE,
    GPU_EXAMPLE,
    MAX_CHANNELS,
    MAX_GPUS_EACH,
    MAX_MACHINES,
    MAX_MEMORY_TIB,
    MAX_THREADS,
    AssumedMachines,
    Ddr,
    Device,
    Machine,
    Network,
)

_GIB = 1 << 30
_UNIT_BYTES = {"M": 1 << 20, "G": _GIB, "T": _GIB << 10}
_RATE_BYTES = {"M": 1e6, "G": 1e9, "MI": float(1 << 20), "GI": float(_GIB)}
_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_TIMES = r"[xX*×]"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_COUNT = _pattern(rf"(?P<count>\d{{1,4}})\s*{_TIMES}\s*(?=\d)")
_COUNT_BEHIND = _pattern(rf"{_TIMES}\s*(?P<count>\d{{1,4}})(?![\d.]|\s*[MGT]i?B)")
_MEMORY = _pattern(rf"(?P<memory>{_NUMBER})\s*(?P<unit>[MGT])(?:i?B)?(?![a-wyz]|/s)")
_AT = re.compile("@")
_RATE = _pattern(rf"(?P<read>{_NUMBER})\s*(?P<unit>[MG]i?)B/s(?:ec)?(?![a-z])")
_DDR = _pattern(
    rf"(?:(?P<before>\d{{1,3}})\s*{_TIMES}\s*)?(?:LP)?DDR(?P<generation>[345])(?!\d)(?:-(?P<speed>\d{{3,5}}))?"
    rf"(?:\s*{_TIMES}\s*(?P<behind>\d{{1,3}}))?(?![a-z\d])"
)
_THREADS = re.compile(r"/\s*(?P<threads>\d{1,9})(?![\d.])")
_TOPS = _pattern(rf"@\s*(?P<tops>{_NUMBER})\s*TOPS(?![a-z])")
_COUNT_OF_GPUS = _pattern(rf"(?P<count>\d{{1,4}})\s*{_TIMES}\s*(?=[a-z])")
_GPU_NAME = _pattern(rf"(?P<name>[a-z][a-z\d]*(?:[\s-]+[a-z\d]+)*?)(?=(?:\s+{_TIMES}\s*\d{{1,4}})?\s*(?:[+,]|$))")
_GPU = _pattern(r"gpus?(?![a-z])")
_LINK = _pattern(rf"(?P<rate>{_NUMBER})\s*(?P<unit>[MG])(?:bit(?:/s)?|bps|be)(?![a-z])")
_ROUND_TRIP = _pattern(rf"(?P<time>{_NUMBER})\s*(?P<unit>ms|us|µs)(?![a-z])")
_TERAOPS_MACS = 0.5e12
"""Multiply-accumulates (MACs) in 10^12 operations. A MAC counts as two operations."""
_BANDWIDTH = "the bandwidth of reading memory as @25GB/s, or the kind of memory as @DDR3, @DDR4 or @DDR5"
_GPU_BANDWIDTH = "the bandwidth of a GPU's memory, as in 12GB@360GB/s gpu (in GB/s), or a GPU's name, as in rtx3060"
_SHOWN = 30


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._skip()

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
            self._skip()
        return found

    def takes(self, character: str) -> bool:
        return self.take(re.compile(re.escape(character))) is not None

    def is_group(self) -> bool:
        counted = _COUNT.match(self.text, self.at)
        return _MEMORY.match(self.text, self.at if counted is None else counted.end()) is not None

    def error(self, wanted: str, at: int | None = None) -> UsageError:
        place = self.at if at is None else at
        rest = re.split(r"[+,]", self.text[place + 1 :], maxsplit=1)[0]
        part = (self.text[place : place + 1] + rest).rstrip()
        shown = repr(part if len(part) <= _SHOWN else f"{part[:_SHOWN]}...")
        found = f"{shown} at character {place + 1}" if part else f"the end at character {place + 1}"
        return UsageError(f"--assume: expected {wanted}, found {found}; for example --assume {EXAMPLE!r}")

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1


@dataclass(frozen=True, slots=True)
class _Group:
    """`count` equal machines or, if `is_gpu` is True, `count` equal GPUs in each machine of the previous group."""

    begun: int  # Position in the text where the group begins.
    count: int
    device: Device
    is_gpu: bool


def parse_machines(text: str) -> AssumedMachines:
    """Parses a description such as "2x16GB@40GB/s/8 + rtx3090 + 8GB, 1Gbit, 0.3ms". Equal machines have the form
    `[Nx]MEMORY[@BANDWIDTH]`, followed by `/THREADS` or `@TOPS` if known. GPUs follow their machines, and the network
    comes last. Raises UsageError with the position of a mistake."""
    reader = _Reader(text)
    groups: list[list[Machine]] = []
    while True:
        _add(groups, _named_gpus(reader, is_first=not groups) or _group(reader), reader)
        if not reader.takes("+"):
            break
    network = _network(reader)
    if reader.at < len(reader.text):
        raise _unexpected(reader)
    return AssumedMachines(tuple(machine for group in groups for machine in group), network)


def _unexpected(reader: _Reader) -> UsageError:
    if reader.is_group():
        return reader.error('"+" before machines that differ, as in "3x16GB + 8GB"')
    return reader.error('"+" and further machines, or "," and the network')


def _group(reader: _Reader) -> _Group:
    begun = reader.at
    before = reader.take(_COUNT)
    memory_at = reader.at
    memory = reader.take(_MEMORY)
    if memory is None:
        raise reader.error("memory such as 16GB, or machines such as 3x16GB", memory_at)
    behind = reader.take(_COUNT_BEHIND)
    if before is not None and behind is not None:
        raise reader.error("the number of machines only once, before or after the memory", begun)
    counted = before or behind
    count = 1 if counted is None else int(counted["count"])
    memory_bytes = int(float(memory["memory"]) * _UNIT_BYTES[memory["unit"].upper()])
    if not count or not memory_bytes:
        raise reader.error("numbers above 0", begun)
    if memory_bytes > MAX_MEMORY_TIB * 1024 * _GIB:
        raise reader.error(f"at most {MAX_MEMORY_TIB} TB of memory", memory_at)
    bandwidth = None if _TOPS.match(reader.text, reader.at) else _bandwidth(reader)
    device = replace(_computing(reader), memory_bytes=memory_bytes, bandwidth=bandwidth)
    return _Group(begun, count, device, reader.take(_GPU) is not None)


def _named_gpus(reader: _Reader, *, is_first: bool) -> _Group | None:
    begun = reader.at
    before, at = reader.take(_COUNT_OF_GPUS), reader.at
    named = reader.take(_GPU_NAME)
    name = None if named is None else find_gpu(named["name"])
    if named is None or (is_first and name is None):
        reader.at = begun
        return None
    if name is None:
        known = similar_gpus(named["name"]) or ("rtx3090", "p40", "h100")
        raise reader.error(f"the name of a GPU ({', '.join(known)}, ...) or its memory and bandwidth", at)
    behind = reader.take(_COUNT_BEHIND)
    if before is not None and behind is not None:
        raise reader.error("the number of GPUs only once, before or after the name", begun)
    counted = before or behind
    count = 1 if counted is None else int(counted["count"])
    if not count:
        raise reader.error("numbers above 0", begun)
    model = GPU_MODELS[name]
    figures = model.memory_bytes, 1e9 * model.bandwidth_gb_s, model.tops * _TERAOPS_MACS
    return _Group(begun, count, Device(*figures, gpu_name=name, has_matrix_units=model.has_matrix_units), True)


def _bandwidth(reader: _Reader) -> float | Ddr | None:
    begun = reader.at
    if reader.take(_AT) is None:
        return None
    if (rate := reader.take(_RATE)) is not None:
        read_bytes_s = float(rate["read"]) * _RATE_BYTES[rate["unit"].upper()]
        if not read_bytes_s:
            raise reader.error("numbers above 0", begun)
        return read_bytes_s
    kind = reader.take(_DDR)
    if kind is None:
        raise reader.error(_BANDWIDTH, begun)
    channels, speed = kind["before"] or kind["behind"], kind["speed"]
    if channels is not None and not 0 < int(channels) <= MAX_CHANNELS:
        raise reader.error(f"1 to {MAX_CHANNELS} channels of memory", begun)
    if speed is not None and not int(speed):
        raise reader.error("numbers above 0", begun)
    return Ddr(int(kind["generation"]), _integer(channels), _integer(speed))


def _integer(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


def _computing(reader: _Reader) -> Device:
    begun = reader.at
    if (threads := reader.take(_THREADS)) is not None:
        count = int(threads["threads"])
        if not 0 < count <= MAX_THREADS:
            raise reader.error(f"1 to {MAX_THREADS} threads a machine", begun)
        return Device(0, threads=count)
    if (tops := reader.take(_TOPS)) is not None:
        if not float(tops["tops"]):
            raise reader.error("numbers above 0", begun)
        return Device(0, macs_s=float(tops["tops"]) * _TERAOPS_MACS)
    return Device(0)


def _add(groups: list[list[Machine]], group: _Group, reader: _Reader) -> None:
    if not group.is_gpu:
        if sum(map(len, groups)) + group.count > MAX_MACHINES:
            raise reader.error(f"at most {MAX_MACHINES} machines", group.begun)
        groups.append([Machine(group.device)] * group.count)
        return
    if not groups:
        raise reader.error(f"a machine before its GPU, as in {GPU_EXAMPLE!r}", group.begun)
    if not isinstance(group.device.bandwidth, float):
        raise reader.error(_GPU_BANDWIDTH, group.begun)
    if group.device.threads is not None:
        raise reader.error("a GPU's speed as @TOPS, not /THREADS", group.begun)
    gpus = (*groups[-1][0].gpus, *((group.device,) * min(group.count, MAX_GPUS_EACH + 1)))
    if len(gpus) > MAX_GPUS_EACH:
        raise reader.error(f"at most {MAX_GPUS_EACH} GPUs for each machine", group.begun)
    groups[-1] = [replace(machine, gpus=gpus) for machine in groups[-1]]


def _network(reader: _Reader) -> Network:
    if not reader.takes(","):
        return Network()
    begun = reader.at
    if (link := reader.take(_LINK)) is None:
        raise _unexpected(reader) if reader.is_group() else reader.error("the network's speed as 1Gbit or 100Mbit")
    bits_s = float(link["rate"]) * (1e9 if link["unit"].upper() == "G" else 1e6)
    if not bits_s:
        raise reader.error("numbers above 0", begun)
    if not reader.takes(","):
        return Network(bits_s)
    if (time := reader.take(_ROUND_TRIP)) is None:
        raise _unexpected(reader) if reader.is_group() else reader.error("the network's round trip as 0.3ms")
    return Network(bits_s, float(time["time"]) * (1e-3 if time["unit"].lower() == "ms" else 1e-6))
