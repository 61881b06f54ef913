"""Tests of the encoding of MTP heads' inputs and results."""

from __future__ import annotations

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.bounds import MAX_DRAFTED_TOKENS, MAX_VOCABULARY
from llamaclust.core.sampler.results import RowResult
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result
from llamaclust.wire.microbatch.results import decode_result
from support.wire.slow_codec import decode_microbatch, encode_result

GOOD = (
    Chunk((1, 2), 5, (0, 1), 0, next_token=0),
    Chunk((1, 2), 5, (0, 1), 2, next_token=MAX_VOCABULARY - 1),
    Chunk((1,), 5, (0, 1), 1, drafts=MAX_DRAFTED_TOKENS),
)
BAD = (
    Chunk((1, 2), 5, (0, 1), 0, next_token=MAX_VOCABULARY),
    Chunk((1,), 5, (0, 1), 1, drafts=MAX_DRAFTED_TOKENS + 1),
)


def test_chunks_keep_the_token_behind_them_and_the_number_of_drafts() -> None:
    assert decode_microbatch(encode_microbatch(Microbatch("m", 1, 7, GOOD))).chunks == GOOD


@pytest.mark.parametrize("chunk", BAD)
def test_chunks_out_of_bounds_are_refused(chunk: Chunk) -> None:
    with pytest.raises(ProtocolError):
        decode_microbatch(encode_microbatch(Microbatch("m", 1, 7, (chunk,))))


def test_results_keep_drafted_tokens_and_their_time() -> None:
    rows = (RowResult(3, -1.0, drafted=(4, 0, 5)), RowResult(3, -1.0, drafted=(9,) * MAX_DRAFTED_TOKENS))
    result = Result(1, 0, rows, drafting_ns=12345)
    assert decode_result(encode_result(result)) == result


@pytest.mark.parametrize("drafted", [(9,) * (MAX_DRAFTED_TOKENS + 1), (MAX_VOCABULARY,)])
def test_drafted_tokens_out_of_bounds_are_refused(drafted: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        decode_result(encode_result(Result(1, 0, (RowResult(3, -1.0, drafted=drafted),))))
