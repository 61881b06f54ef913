"""SentencePiece's precompiled map of characters: the length of a trie, the trie as a double array (darts-clone), and
the texts that its leaves point to, each ended by a zero byte."""

from __future__ import annotations

from typing import Final

import numpy as np

from llamaclust.core.errors import ModelFileError

_LEAF_BIT: Final = 1 << 8
_VALUE_BIT: Final = 1 << 31
_BLOCK: Final = 256


def check_charsmap(data: bytes, origin: str) -> None:
    """ModelFileError where following the trie with any text could lead outside of it or of the texts."""
    if not data:
        return
    length = int.from_bytes(data[:4], "little")
    if len(data) < 4 or length < 4 * _BLOCK or length % 4 or 4 + length >= len(data) or data[-1] != 0:
        raise ModelFileError(f"{origin}: {len(data)} bytes do not fit a trie of {length} and texts behind it")
    units = np.frombuffer(data, "<u4", length // 4, 4).astype(np.int64)
    inner = np.flatnonzero(units & _VALUE_BIT == 0)
    first = inner ^ _offsets(units[inner])
    if (first | (_BLOCK - 1)).max(initial=0) >= len(units):
        raise ModelFileError(f"{origin}: a branch of its trie leads outside of it")
    values = units[first[units[inner] & _LEAF_BIT != 0]] & (_VALUE_BIT - 1)
    if values.max(initial=0) >= len(data) - 4 - length:
        raise ModelFileError(f"{origin}: a leaf of its trie points outside of the texts")


def _offsets(units: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where a unit's branches are, from its own place: 22 bits, eight times as far where another bit says so."""
    return (units >> 10) << ((units & (1 << 9)) >> 6)
