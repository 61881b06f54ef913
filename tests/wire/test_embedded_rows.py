"""Tests of invalid embedded rows in microbatches, and of invalid hidden states in results."""

from __future__ import annotations

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_EMBEDDING_BYTES
from llamaclust.proto import sampling_pb2
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from llamaclust.wire.microbatch.results import decode_result
from support.wire.slow_codec import decode_microbatch


@pytest.mark.parametrize("n_bytes", [5, MAX_EMBEDDING_BYTES + 4])
def test_embeddings_that_cannot_be_are_refused(n_bytes: int) -> None:
    with pytest.raises(ProtocolError, match="embeddings"):
        decode_result(sampling_pb2.Result(embeddings=bytes(n_bytes)).SerializeToString())


@pytest.mark.parametrize("embedded", [(2, 1), (0, 3)])
def test_embedded_rows_outside_the_chunk_are_refused(embedded: tuple[int, int]) -> None:
    microbatch = Microbatch("m", 1, 0, (Chunk((1, 2), 0, (0, 1), 0, embedded=embedded),))
    with pytest.raises(ProtocolError, match="embedded row"):
        decode_microbatch(encode_microbatch(microbatch))
