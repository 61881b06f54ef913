"""Finds the memory maps of cache files in huge pages, and moves other memory of this process to huge pages."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from llamaclust.core.sizes import MIB
from llamaclust.kernels._native import Memory

_log = logging.getLogger(__name__)

_HUGE_PAGE_BYTES = 1 << 21
_ENOUGH = 0.9
"""Memory counts as huge if at least this fraction of it is in huge pages."""
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COMPACT = "as root, before a restart: echo 1 > /proc/sys/vm/compact_memory"


def in_huge_pages(memories: Sequence[Memory]) -> list[bool]:
    """Tells which maps are in huge pages. Returns True for all maps if huge pages are disabled."""
    if _no_huge_pages():
        return [True] * len(memories)
    huge_bytes = {addresses.start: n_bytes for addresses, n_bytes in _huge_bytes("FilePmdMapped|ShmemPmdMapped")}
    return [
        huge_bytes.get(memory.address, 0) >= _ENOUGH * (memory.bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
        for memory in memories
    ]


def move_to_huge_pages(memories: Sequence[Memory], pool: Executor) -> None:
    """Moves filled memory to free huge pages. Logs what to do if too few huge pages are free."""
    memories = [memory for memory in memories if memory.bytes >= _HUGE_PAGE_BYTES]
    if not memories:
        return
    if _no_huge_pages():
        _log.info("packed weights are in small pages, which stream 6 to 8 %% slower: %s", _disabled())
        return
    for _ in pool.map(Memory.collapse, memories):
        pass
    total = sum(memory.bytes for memory in memories)
    huge = own_huge_bytes(memories)
    text = f"{huge // MIB} of {total // MIB} MiB of packed weights are in huge pages"
    if huge < _ENOUGH * sum(memory.bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES for memory in memories):
        text += f"; the rest streams 6 to 8 % slower, because free memory is fragmented: {_COMPACT}"
    _log.info("%s", text)


def own_huge_bytes(memories: Sequence[Memory]) -> int:
    return sum(
        n_bytes
        for addresses, n_bytes in _huge_bytes("AnonHugePages")
        if any(memory.address in addresses for memory in memories)
    )


def _no_huge_pages() -> bool:
    try:
        return "[never]" in _ENABLED.read_text()
    except OSError:
        return True


def _disabled() -> str:
    if _ENABLED.exists():
        return f"huge pages are disabled; as root: echo madvise > {_ENABLED}"
    return "this kernel has no transparent huge pages"


def _huge_bytes(fields: str) -> Iterator[tuple[range, int]]:
    """Yields (addresses, bytes in huge pages) for each of this process's mappings with huge pages."""
    try:
        smaps = Path("/proc/self/smaps").read_text()
    except OSError:
        return
    addresses, wanted = range(0), rf"^(?:([0-9a-f]+)-([0-9a-f]+) |(?:{fields}):\s+([1-9]\d*) kB)"
    for begin, end, kib in re.findall(wanted, smaps, re.MULTILINE):
        if begin:
            addresses = range(int(begin, 16), int(end, 16))
        else:
            yield addresses, int(kib) * 1024
