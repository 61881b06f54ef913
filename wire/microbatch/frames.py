"""Frames of the stream between stages: a microbatch's header bytes, timings so far, and the hidden state or a failure.

    0  "LCST" | version u8 | kind u8 | timings u16 | header bytes u32 | body bytes u32      little-endian
    16 timings, four u64 each: queue ns, compute ns, wire ns, rows
       body: float32 [rows, embedding] of a HIDDEN frame (none before the first stage), UTF-8 of a FAILURE
       header: the microbatch as its sender encoded it

The body comes before the header so that it stands 16-byte aligned in the received bytes and is used where it lies.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.bounds import MAX_TEXT, bounded, line, one_line
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES
from llamaclust.wire.microbatch.messages import StageTiming

MAX_FRAME_BYTES = 1 << 28

_MAGIC = b"LCST"
_VERSION = 1
_PREFIX = struct.Struct("<4sBBHII")
_TIMING = struct.Struct("<4Q")


def most_frame_bytes(rows: int, width: int) -> int:
    """Returns the largest size of a frame with `rows` rows of hidden state; `width` is 0 before the first stage."""
    return _PREFIX.size + MAX_STAGES * _TIMING.size + MAX_MICROBATCH_BYTES + max(rows * width * 4, 4 * MAX_TEXT)


class FrameKind(IntEnum):
    HIDDEN = 1
    FAILURE = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame; `body` looks into the received bytes."""

    kind: FrameKind
    header: bytes
    timings: tuple[StageTiming, ...]
    body: memoryview

    def hidden(self, rows: int, width: int) -> NDArray[np.float32]:
        """The body as float32 [rows, width], read-only, not copied. ProtocolError where its size is another."""
        if len(self.body) != rows * width * 4:
            raise ProtocolError(f"hidden state of {len(self.body)} bytes, {rows} x {width} float32 expected")
        return np.frombuffer(self.body, np.dtype("<f4")).reshape(rows, width)

    @property
    def failure(self) -> str:
        """The line of a FAILURE frame."""
        return line("failure", bytes(self.body).decode("utf-8", "replace"))


def encode_hidden(header: bytes, timings: tuple[StageTiming, ...], hidden: NDArray[np.float32] | None) -> bytes:
    """A HIDDEN frame; `hidden` [rows, embedding] is copied once, None before the first stage."""
    body = memoryview(b"") if hidden is None else np.ascontiguousarray(hidden, "<f4").data.cast("B")
    return _encode(FrameKind.HIDDEN, header, timings, body)


def encode_failure(header: bytes, timings: tuple[StageTiming, ...], failure: str) -> bytes:
    """A FAILURE frame, which later stages pass on so that the coordinator gets its result in order."""
    return _encode(FrameKind.FAILURE, header, timings, memoryview(one_line(failure).encode()))


def _encode(kind: FrameKind, header: bytes, timings: tuple[StageTiming, ...], body: memoryview) -> bytes:
    prefix = _PREFIX.pack(_MAGIC, _VERSION, kind, len(timings), len(header), len(body))
    packed = [_TIMING.pack(t.queue_ns, t.compute_ns, t.wire_ns, t.rows) for t in timings]
    return b"".join((prefix, *packed, body, header))


def decode_frame(data: bytes) -> Frame:
    """Raises ProtocolError for bytes that are no frame, of another version or of other lengths than they say."""
    if len(data) < _PREFIX.size:
        raise ProtocolError(f"frame of {len(data)} bytes, shorter than its prefix")
    magic, version, kind, stages, header_bytes, body_bytes = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise ProtocolError(f"frame begins with {magic!r}, not with {_MAGIC!r}")
    if version != _VERSION:
        raise ProtocolError(f"frame version {version}, this worker speaks {_VERSION}")
    if kind not in (FrameKind.HIDDEN, FrameKind.FAILURE):
        raise ProtocolError(f"frame kind {kind} is not known")
    bounded("stages", stages, 0, MAX_STAGES)
    bounded("header bytes", header_bytes, 1, MAX_MICROBATCH_BYTES)
    body_at = _PREFIX.size + stages * _TIMING.size
    header_at = body_at + body_bytes
    if len(data) != header_at + header_bytes:
        raise ProtocolError(f"frame of {len(data)} bytes, its prefix says {header_at + header_bytes}")
    timings = tuple(StageTiming(*values) for values in _TIMING.iter_unpack(data[_PREFIX.size : body_at]))
    for timing in timings:
        bounded("rows of a timing", timing.rows, 1, MAX_BATCH_TOKENS)
    frame = Frame(FrameKind(kind), data[header_at:], timings, memoryview(data)[body_at:header_at])
    if frame.kind is FrameKind.FAILURE:
        bounded("length of failure", body_bytes, 1, MAX_TEXT)
    return frame
