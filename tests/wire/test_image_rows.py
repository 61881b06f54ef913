"""Tests of image rows in microbatches: none, the largest number, and a stage whose model has no image input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_GIVEN_BYTES, MAX_SEQUENCES
from llamaclust.proto import microbatch_pb2
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.messages import Chunk, ImageRows, Microbatch
from support.wire.frame_reader import GIVEN_WIDTH, MODEL_ID, SECTIONS, reader

CHUNK = Chunk((4, 0, 0, 0, 5), 8, (3, 1), 1)
VALUES = np.arange(3 * GIVEN_WIDTH, dtype="<f4")
POSITIONS = np.array([[8] * 3, [9, 9, 9], [9, 9, 10], [9, 10, 9], [11] * 3], "<i4")
IMAGES = ImageRows(((1, 4),), VALUES.tobytes(), ((1, 4),), POSITIONS.tobytes())


def frame_of(*chunks: Chunk) -> bytes:
    return encode_hidden(encode_microbatch(Microbatch(MODEL_ID, 1, 0, chunks)))


def test_a_microbatch_without_images_has_no_byte_for_them() -> None:
    data = encode_microbatch(Microbatch(MODEL_ID, 1, 0, (replace(CHUNK, next_token=7),)))
    assert not microbatch_pb2.Microbatch.FromString(data).HasField("images")
    *_, rope_positions, groups, given = reader().read(frame_of(CHUNK)).arrays
    assert rope_positions is None and groups is None and given is None


def test_a_stage_gets_the_arrays_of_a_batch() -> None:
    *_, rope_positions, groups, given = (
        reader().read(frame_of(Chunk((9, 9), 3, (0, 1), 0), replace(CHUNK, images=IMAGES))).arrays
    )
    assert rope_positions is not None and groups is not None and given is not None
    assert rope_positions.tolist() == np.concatenate([[[3] * 3, [4] * 3], POSITIONS]).T.tolist()
    assert groups.tolist() == [[3, 4], [4, 5], [8, 9], *[[9, 12]] * 3, [12, 13]]
    assert given[0].tolist() == [3, 4, 5] and given[1].tolist() == VALUES.reshape(3, -1).tolist()


@pytest.mark.parametrize(
    ("images", "takes", "reason"),
    [
        (IMAGES, (0, SECTIONS), "rows of images, this model takes none"),
        (ImageRows(groups=((0, 2),)), (0, SECTIONS), "rows of images, this model takes none"),
        (IMAGES, (GIVEN_WIDTH, 0), "rope positions, rows of this model have one each"),
        (IMAGES, (GIVEN_WIDTH + 1, SECTIONS), "6 values of given rows, 9 expected"),
        (IMAGES, (GIVEN_WIDTH, SECTIONS + 1), "rope positions: there are 15, more are needed"),
    ],
)
def test_what_a_model_cannot_take_is_refused_by_name(images: ImageRows, takes: tuple[int, int], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        reader(images=takes).read(frame_of(replace(CHUNK, images=images)))


def test_the_largest_rows_of_images_fit_beside_everything_else() -> None:
    rows = MAX_BATCH_TOKENS - MAX_SEQUENCES + 1
    largest = ImageRows(((0, rows),), bytes(MAX_GIVEN_BYTES), ((0, rows),), bytes(16 * rows))
    chunk = Chunk((0,) * rows, 0, tuple(range(2 * rows)), 1, images=largest)
    others = (Chunk((1,), 1000, tuple(range(200)), 1),) * (MAX_SEQUENCES - 1)
    assert len(encode_microbatch(Microbatch(MODEL_ID, 1, 0, (chunk, *others)))) < MAX_MICROBATCH_BYTES
