"""Tests of memory in huge pages, as the kernel counts them."""

from __future__ import annotations

import ctypes
import logging
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.sizes import MIB
from llamaclust.kernels._native import Memory
from llamaclust.kernels.packed import mapping
from llamaclust.kernels.packed.mapping import move_to_huge_pages, own_huge_bytes

_MADV_COLLAPSE = 25
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def require_huge_pages() -> None:
    if not _ENABLED.exists() or "[never]" in _ENABLED.read_text():
        pytest.skip("huge pages are disabled")


def moves_pages() -> bool:
    """Asks the kernel itself to move small pages."""
    memory, libc = Memory(8 * MIB), ctypes.CDLL(None, use_errno=True)
    memory.view[:] = 1
    split(memory)
    before = own_huge_bytes([memory])
    address, size = ctypes.c_void_p(memory.address), ctypes.c_size_t(8 * MIB)
    return libc.madvise(address, size, _MADV_COLLAPSE) == 0 and own_huge_bytes([memory]) > before


def flags_of(memory: Memory) -> list[str]:
    """Returns the VmFlags of the mapping that contains the memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            first, last = (int(number, 16) for number in fields[0].split("-"))
            inside = first <= memory.address < last
        elif inside and fields[0] == "VmFlags:":
            return fields[1:]
    raise AssertionError("no such map")


def test_memory_is_advised_for_huge_pages() -> None:
    require_huge_pages()
    assert "hg" in flags_of(Memory(8 * MIB))


def test_small_pages_become_huge_ones_with_the_same_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """The process itself splits huge pages, as if none had been free."""
    require_huge_pages()
    if not moves_pages():
        pytest.skip("this system moves no pages (Linux before 6.1), or has no free memory in one piece")
    memory, small = Memory(8 * MIB), Memory(MIB)
    memory.view[:] = np.arange(8 * MIB) % 251
    split(memory)
    before, checksum = own_huge_bytes([memory]), memory.checksum()
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO, mapping.__name__):
        move_to_huge_pages([memory, small], pool)
    after = own_huge_bytes([memory])
    assert memory.checksum() == checksum
    (record,) = caplog.records
    said, _, why = record.getMessage().partition("; ")
    assert said == f"{after // MIB} of 8 MiB of packed weights are in huge pages"
    assert ("compact_memory" in why) == (after < 0.9 * 8 * MIB)
    if after == before and not moves_pages():
        pytest.skip("another process has taken the free memory meanwhile")
    assert before < after <= 8 * MIB


def test_a_line_says_when_huge_pages_are_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory, file = Memory(4 * MIB), tmp_path / "enabled"
    monkeypatch.setattr(mapping, "_ENABLED", file)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO, mapping.__name__):
        move_to_huge_pages([memory], pool)
        file.write_text("always madvise [never]\n")
        move_to_huge_pages([memory], pool)
        move_to_huge_pages([Memory(MIB)], pool)
    slower = "packed weights are in small pages, which stream 6 to 8 % slower"
    assert [record.getMessage() for record in caplog.records] == [
        f"{slower}: this kernel has no transparent huge pages",
        f"{slower}: huge pages are disabled; as root: echo madvise > {file}",
    ]


def test_a_line_says_what_to_do_where_free_memory_is_in_small_pieces(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require_huge_pages()
    monkeypatch.setattr(mapping, "own_huge_bytes", lambda memories: 2 * MIB)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO, mapping.__name__):
        move_to_huge_pages([Memory(3 * MIB)], pool)
        assert "compact_memory" not in caplog.text, "the last page of memory is small"
        move_to_huge_pages([Memory(4 * MIB)], pool)
    assert "2 of 4 MiB of packed weights are in huge pages; the rest streams" in caplog.text
    assert "echo 1 > /proc/sys/vm/compact_memory" in caplog.text


def split(memory: Memory) -> None:
    """Splits each huge page: discards pages in its middle and writes the same bytes again."""
    kept = memory.view.copy()
    libc = ctypes.CDLL(None)
    for offset in range(0, memory.bytes, 2 * MIB):
        start = ctypes.c_void_p(memory.address + offset + MIB)
        assert libc.madvise(start, mmap.PAGESIZE, mmap.MADV_DONTNEED) == 0
    memory.view[:] = kept
