"""Frames of the stream between stages. A frame contains a microbatch's header, the timings of the stages so far, and
the hidden state or a failure.

    0  "LCST" | version u8 | kind u8 | timings u16 | header bytes u32 | body bytes u32      little-endian
    16 timings, four u64 each: queue ns, compute ns, wire ns, rows
       body: float32 [rows, embedding] of a HIDDEN frame (none before the first stage), UTF-8 of a FAILURE
       header: the microbatch as its sender encoded it

The body precedes the header, so that the body is 16-byte aligned in the received bytes and can be used in place.
Stages read and write frames natively (kernels/cpu/native/frames)."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.bounds import MAX_TEXT
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES

MAX_FRAME_BYTES = 1 << 28

_MAGIC, _VERSION, _HIDDEN = b"LCST", 2, 1
_PREFIX = struct.Struct("<4sBBHII")
_TIMING_BYTES = 32


def most_frame_bytes(rows: int, width: int) -> int:
    """Returns the maximum size of a frame with `rows` rows of `width` floats. `width` is 0 for the first stage."""
    return _PREFIX.size + MAX_STAGES * _TIMING_BYTES + MAX_MICROBATCH_BYTES + max(rows * width * 4, 4 * MAX_TEXT)


def encode_hidden(header: bytes, hidden: NDArray[np.float32] | None = None) -> bytes:
    """Encodes a HIDDEN frame without timings. `hidden` is [rows, embedding], or None for the first stage."""
    body = memoryview(b"") if hidden is None else np.ascontiguousarray(hidden, "<f4").data.cast("B")
    return b"".join((_PREFIX.pack(_MAGIC, _VERSION, _HIDDEN, 0, len(header), len(body)), body, header))
