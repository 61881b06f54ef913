"""How memory of a GPU is counted: in the pieces that its driver gives out, so that sums come out to the byte."""

from __future__ import annotations

ALIGNMENT = 256
"""Of what lies together in one piece."""

_GRANULE = 2 << 20
"""The driver gives out no less."""


def aligned(n_bytes: int) -> int:
    """Where the next thing may begin."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def allocated(n_bytes: int) -> int:
    """What so many bytes take where they are allocated by themselves."""
    return -(-n_bytes // _GRANULE) * _GRANULE


def most_rounded_bytes(parts: int) -> int:
    """What rounding adds, at most, to so many parts that lie together in one piece."""
    return _GRANULE + parts * ALIGNMENT
