"""Sizes of GPU memory, rounded up as the driver does, so that sums are exact to the byte."""

from __future__ import annotations

ALIGNMENT = 256
"""The alignment of parts within one allocation."""

_GRANULE = 2 << 20
"""The driver's smallest allocation."""


def aligned(n_bytes: int) -> int:
    """Returns the next offset at which a part may begin."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def allocated(n_bytes: int) -> int:
    """Returns the bytes that a separate allocation of `n_bytes` takes."""
    return -(-n_bytes // _GRANULE) * _GRANULE


def most_rounded_bytes(parts: int) -> int:
    """Returns the most bytes that rounding adds to one allocation of `parts` parts."""
    return _GRANULE + parts * ALIGNMENT
