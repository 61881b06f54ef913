"""Messages of an Encode stream. A request is an image tile. The answer is frames with the rows that the encoder
computes from the tile.

request   height u32 | width u32 | uint8 [height, width, 3]                 little-endian
answer    1 | bytes of the float32 rows: FRAME_BYTES of them, fewer only in the last frame of a tile
          0 | one line of UTF-8: the reason why the encoder refuses the tile
          2: the tile still waits or is being computed"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.bounds import bounded, line, one_line
from llamaclust.core.errors import ProtocolError, RequestError
from llamaclust.core.limits import MAX_TILE_PIXELS

FRAME_BYTES = 1 << 19
_COLOURS = 3
_SIZE = struct.Struct("<II")
_REFUSED, _ROWS = b"\x00", b"\x01"
COMPUTING = b"\x02"
_MAX_LINE_BYTES = 4096


def tile_bytes(pixels: int) -> int:
    return _SIZE.size + _COLOURS * pixels


def encode_tile(tile: NDArray[np.uint8]) -> bytes:
    height, width, _ = tile.shape
    return b"".join((_SIZE.pack(height, width), np.ascontiguousarray(tile).data.cast("B")))


def decode_tile(data: bytes) -> NDArray[np.uint8]:
    """Returns a view of `data`, [height, width, 3]. Raises ProtocolError if the tile is empty or has a wrong length."""
    if len(data) < _SIZE.size:
        raise ProtocolError(f"an image tile has {len(data)} bytes; its height and width alone take {_SIZE.size}")
    height, width = _SIZE.unpack_from(data)
    bounded("pixels of a tile", height * width, 1, MAX_TILE_PIXELS)
    due = tile_bytes(height * width)
    if len(data) != due:
        raise ProtocolError(f"an image tile of {width} x {height} pixels has {len(data)} bytes; expected {due}")
    return np.frombuffer(data, np.uint8, offset=_SIZE.size).reshape(height, width, _COLOURS)


def row_frames(rows: NDArray[np.float32]) -> Iterator[bytes]:
    data = np.ascontiguousarray(rows, "<f4").data.cast("B")
    for start in range(0, len(data), FRAME_BYTES):
        yield b"".join((_ROWS, data[start : start + FRAME_BYTES]))


def encode_refusal(why: str) -> bytes:
    return _REFUSED + one_line(why).encode()


class RowsReader:
    def __init__(self, count: int, width: int) -> None:
        self._rows = np.empty((count, width), "<f4")
        self._left = self._rows.reshape(-1).view(np.uint8)

    @property
    def is_complete(self) -> bool:
        return not len(self._left)

    @property
    def rows(self) -> NDArray[np.float32]:
        return self._rows.astype(np.float32, copy=False)

    def take(self, frame: bytes) -> None:
        """Stores a frame's rows. Raises RequestError for a refused tile, and ProtocolError for a wrong frame."""
        if frame[:1] == _REFUSED and len(frame) <= _MAX_LINE_BYTES:
            raise RequestError(line("reason", frame[1:].decode("utf-8", "replace")) or "the encoder refused the tile")
        if frame == COMPUTING and len(self._left) == self._rows.nbytes:
            return
        due = min(FRAME_BYTES, len(self._left))
        if frame[:1] != _ROWS or len(frame) != due + 1:
            raise ProtocolError(f"a frame of an image tile's rows has {len(frame)} bytes; expected {due + 1}")
        data = np.frombuffer(frame, np.uint8, offset=1)
        if not np.isfinite(data.view("<f4")).all():
            raise ProtocolError("an image tile's rows contain numbers that are not finite")
        self._left[:due] = data
        self._left = self._left[due:]
