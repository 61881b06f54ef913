"""Messages of a Weights stream. A request gives the SHA-256 of a tensor or manifest, and a range of its bytes. The
answer consists of frames with these bytes.

request   SHA-256 | start u64 | end u64                                      little-endian
answer    1 | bytes: FRAME_BYTES of them, fewer only in the last frame of a range
          0 | one line of UTF-8: the other side does not have the bytes"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.core.bounds import line, one_line
from llamaclust.core.errors import ProtocolError

FRAME_BYTES = 1 << 18  # A link of 100 kbit/s transfers such a frame within the deadline of 30 s.

_ASKED = struct.Struct("<32sQQ")
ASKED_BYTES = _ASKED.size
_MISSING, _BYTES = b"\x00", b"\x01"
_MAX_LINE, _MAX_LINE_BYTES = 200, 1000


class WeightsNotFoundError(ProtocolError):
    """The peer does not have the requested bytes."""


@dataclass(frozen=True, slots=True)
class WeightRange:
    """Bytes [start, end) of the tensor or manifest with this SHA-256 (hex)."""

    content: str
    start: int
    end: int


def encode_range(wanted: WeightRange) -> bytes:
    return _ASKED.pack(bytes.fromhex(wanted.content), wanted.start, wanted.end)


def decode_range(data: bytes) -> WeightRange:
    if len(data) != _ASKED.size:
        raise ProtocolError(f"a request for weights has {len(data)} bytes; expected {_ASKED.size}")
    content, start, end = _ASKED.unpack(data)
    if start > end:
        raise ProtocolError(f"a request for weights starts at byte {start}, after its end {end}")
    return WeightRange(content.hex(), start, end)


def frames_of(data: memoryview) -> Iterator[bytes]:
    """Divides a part of a WeightRange into frames. All parts but the last need a multiple of FRAME_BYTES bytes."""
    for start in range(0, len(data), FRAME_BYTES):
        yield b"".join((_BYTES, data[start : start + FRAME_BYTES]))


def encode_missing(why: str) -> bytes:
    return _MISSING + one_line(why, _MAX_LINE).encode()


def decode_frame(data: bytes, left_bytes: int) -> memoryview:
    """Returns the weights in a frame. `left_bytes` is the number of bytes still expected. Raises WeightsNotFoundError
    if the peer does not have the bytes, and ProtocolError if the frame has a wrong size."""
    if data[:1] == _MISSING and len(data) <= _MAX_LINE_BYTES:
        raise WeightsNotFoundError(
            one_line(line("reason", data[1:].decode("utf-8", "replace")), _MAX_LINE)
            or "the peer does not have the weights"
        )
    due = min(FRAME_BYTES, left_bytes)
    if data[:1] != _BYTES or len(data) != due + 1:
        raise ProtocolError(f"a frame of weights has {len(data)} bytes; expected {due + 1}")
    return memoryview(data)[1:]
