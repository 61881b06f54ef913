"""Tests of messages of Encode streams: encoding, and refusal of invalid bytes."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError, RequestError
from llamaclust.core.limits import MAX_TILE_PIXELS
from llamaclust.wire.encoder import (
    COMPUTING,
    FRAME_BYTES,
    RowsReader,
    decode_tile,
    encode_refusal,
    encode_tile,
    row_frames,
)
from llamaclust.wire.rpc.methods import ENCODE, METHODS
from support.seed import SEED

TILE = np.random.default_rng(SEED).integers(0, 256, (3, 5, 3), np.uint8)


def read(reader: RowsReader, *frames: bytes) -> RowsReader:
    for frame in frames:
        reader.take(frame)
    return reader


@pytest.mark.parametrize("tile", [TILE, TILE[:, ::-1], TILE[:1, :1]])
def test_tiles_arrive(tile: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_tile(encode_tile(tile)), tile)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 64), (4, FRAME_BYTES // 16), (7, 40_000)])
def test_rows_arrive_in_frames(count: int, width: int) -> None:
    rows = np.random.default_rng(SEED).standard_normal((count, width), np.float32)
    frames = [*row_frames(rows)]
    assert len(frames) == -(-rows.nbytes // FRAME_BYTES)
    assert max(map(len, frames)) <= METHODS[ENCODE].reply_bytes
    reader = read(RowsReader(count, width), *frames)
    assert reader.is_complete
    np.testing.assert_array_equal(reader.rows.view("u4"), rows.view("u4"))


def test_frames_of_a_tile_in_progress_precede_its_rows() -> None:
    rows = np.ones((4, FRAME_BYTES // 8), np.float32)
    first, *others = row_frames(rows)
    reader = read(RowsReader(*rows.shape), COMPUTING, COMPUTING, first)
    with pytest.raises(ProtocolError, match="a frame of an image tile's rows has 1 bytes"):
        reader.take(COMPUTING)
    np.testing.assert_array_equal(read(reader, *others).rows, rows)


def test_the_largest_tile_fits_into_a_message() -> None:
    sides = 2048, MAX_TILE_PIXELS // 2048
    assert len(encode_tile(np.zeros((*sides, 3), np.uint8))) == METHODS[ENCODE].request_bytes


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "an image tile has 0 bytes; its height and width alone take 8"),
        (struct.pack("<II", 3, 5), "an image tile of 5 x 3 pixels has 8 bytes; expected 53"),
        (encode_tile(TILE)[:-1], "an image tile of 5 x 3 pixels has 52 bytes; expected 53"),
        (encode_tile(TILE) + b"0", "an image tile of 5 x 3 pixels has 54 bytes; expected 53"),
        (struct.pack("<II", 0, 5), "pixels of a tile is 0"),
        (struct.pack("<II", 1 << 31, 1 << 31), "pixels of a tile is 4611686018427387904"),
        (struct.pack("<II", 2049, MAX_TILE_PIXELS // 2048), "pixels of a tile is"),
    ],
)
def test_damaged_tiles_are_refused(data: bytes, error: str) -> None:
    with pytest.raises(ProtocolError, match=error):
        decode_tile(data)


@pytest.mark.parametrize(
    "frame", [b"", b"\x01", b"\x01" + bytes(47), b"\x01" + bytes(49), b"\x02" + bytes(48), b"\x00" + bytes(4096)]
)
def test_other_frames_than_the_one_that_is_due_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"a frame of an image tile's rows has .* bytes; expected 49"):
        RowsReader(3, 4).take(frame)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = np.nan
    with pytest.raises(ProtocolError, match="rows contain numbers that are not finite"):
        read(RowsReader(3, 4), *row_frames(rows))


def test_nothing_follows_the_last_frame() -> None:
    reader = read(RowsReader(3, 4), b"\x01" + bytes(48))
    with pytest.raises(ProtocolError, match="a frame of an image tile's rows has 2 bytes; expected 1"):
        reader.take(b"\x01\x01")


def test_refusals_are_one_safe_line() -> None:
    with pytest.raises(RequestError, match=r"^a tile of 9 x 9 pixels, 8 x 8 expected$"):
        RowsReader(1, 1).take(encode_refusal("a tile of 9 x 9 pixels,\n8 x 8 expected"))
    with pytest.raises(RequestError, match=r"^the encoder refused the tile$"):
        RowsReader(1, 1).take(b"\x00\x1b\x07")


@given(st.binary(max_size=64))
def test_random_bytes_are_refused_or_decoded(data: bytes) -> None:
    with suppress(ProtocolError):
        decode_tile(data)
    with suppress(ProtocolError, RequestError):
        RowsReader(2, 4).take(data)
