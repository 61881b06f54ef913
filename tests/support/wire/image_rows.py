"""Image rows of chunks, drawn by Hypothesis, and faulty ones."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from llamaclust.wire.microbatch.messages import Chunk, ImageRows
from support.wire.frame_reader import GIVEN_WIDTH, SECTIONS


def image_rows(rows: int, first: int) -> st.SearchStrategy[ImageRows]:
    given, values = ((first, rows),), np.arange((rows - first) * GIVEN_WIDTH, dtype="<f4").tobytes()
    positions = np.arange(rows * SECTIONS, dtype="<i4").tobytes()
    return st.sampled_from(
        [
            ImageRows(given, values),
            ImageRows(given, values, given),
            ImageRows(given, values, given, positions),
            ImageRows(rope_positions=positions),
        ]
    )


FAULTY_IMAGE_ROWS = {
    "no such given row": Chunk((1,), 0, (0, 1), 0, images=ImageRows(((0, 2),), bytes(8 * GIVEN_WIDTH))),
    "given rows out of order": Chunk((1, 2), 0, (0, 1), 0, images=ImageRows(((1, 2), (0, 1)), bytes(8 * GIVEN_WIDTH))),
    "a given row twice": Chunk((1, 2), 0, (0, 1), 0, images=ImageRows(((0, 1), (0, 2)), bytes(12 * GIVEN_WIDTH))),
    "a given row without values": Chunk((1,), 0, (0, 1), 0, images=ImageRows(((0, 1),), bytes(4))),
    "values without a row": Chunk((1,), 0, (0, 1), 0, images=ImageRows(values=bytes(4 * GIVEN_WIDTH))),
    "group behind the chunk": Chunk((1,), 0, (0, 1), 0, images=ImageRows(groups=((0, 2),))),
    "rope positions of a row too few": Chunk((1, 2), 0, (0, 1), 0, images=ImageRows(rope_positions=bytes(12))),
    "negative rope position": Chunk((1,), 0, (0, 1), 0, images=ImageRows(rope_positions=b"\xff" * 12)),
}
