"""Rounds sizes of GPU memory up as the driver does, so that sums of sizes are exact to the byte."""

from __future__ import annotations

ALIGNMENT = 256

_GRANULE = 2 << 20
"""Bytes of the driver's smallest allocation."""


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def allocated(n_bytes: int) -> int:
    return -(-n_bytes // _GRANULE) * _GRANULE


def most_rounded_bytes(parts: int) -> int:
    return _GRANULE + parts * ALIGNMENT
