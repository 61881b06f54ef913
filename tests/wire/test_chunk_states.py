"""Tests of encoded state blocks of sequence slices: values out of range are refused."""

from __future__ import annotations

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_KV_BLOCKS
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.wire.slow_codec import decode_microbatch

GOOD = Chunk((1, 2), 5, (0, 1), 0, state_from=3, state_to=(1, 0, 2, MAX_KV_BLOCKS - 1))
BAD = {
    "state_from": Chunk((1,), 5, (0, 1), 0, state_from=MAX_KV_BLOCKS, state_to=(1, 0)),
    "state block": Chunk((1,), 0, (0, 1), 0, state_to=(1, MAX_KV_BLOCKS)),
    "state behind no row": Chunk((1, 2), 0, (0, 1), 0, state_to=(0, 1, 2, 0)),
    "states in another order": Chunk((1, 2, 3), 0, (0, 1), 0, state_to=(2, 1, 1, 2, 3, 0)),
    "last state elsewhere": Chunk((1, 2), 0, (0, 1), 0, state_to=(1, 0)),
    "state behind the chunk": Chunk((1, 2), 0, (0, 1), 0, state_to=(2, 1, 3, 0)),
}


@pytest.mark.parametrize("name", BAD)
def test_states_out_of_bounds_are_refused(name: str) -> None:
    assert decode_microbatch(encode_microbatch(Microbatch("m", 1, 7, (GOOD,)))).chunks == (GOOD,)
    with pytest.raises(ProtocolError):
        decode_microbatch(encode_microbatch(Microbatch("m", 1, 7, (BAD[name],))))
