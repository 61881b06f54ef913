"""Tests of the messages with which a group's leader begins a step: they arrive unchanged, and all other data is
rejected."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.wire.microbatch.messages import SampledTokens
from llamaclust.worker.stage.leading import Leader, decode_step, encode_step
from support.seed import SEED


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_step_arrives_as_it_was(count: int) -> None:
    print(f"seed {SEED}")
    source = Random(SEED)
    followed = [SampledTokens(7 * number, tuple(source.sample(range(1000), number))) for number in range(count)]
    frame = source.randbytes(source.randrange(1, 500))
    digest = source.randbytes(32)
    found, tokens, bands, adapters = decode_step(encode_step(frame, followed, count + 1, digest))
    assert (found, bands, adapters) == (frame, count + 1, digest)
    assert [sampled for sampled, _ in tokens._came.values()] == followed


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1\0\0",
        struct.pack("<I", 1) + bytes(32),
        struct.pack("<I32xI", 1, 1),
        struct.pack("<I32xI", 1, 1 << 31) + bytes(64),
        struct.pack("<I32xII", 1, 1, 1 << 31) + bytes(64),
        struct.pack("<I32xII", 1, 1, 9) + b"\xff" * 9,
        *(struct.pack("<I32xI", bands, 0) for bands in (0, 5, 1 << 31)),
        encode_step(b"", [SampledTokens(4, (1,)), SampledTokens(4, (1,))], 1, bytes(32)),
        encode_step(b"", [SampledTokens(4, (1,)), SampledTokens(3, (1,))], 1, bytes(32)),
    ],
)
def test_what_is_no_step_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_step(data)


@pytest.mark.parametrize("has_groups", [False, True])
def test_rows_that_see_later_ones_are_one_band(has_groups: bool) -> None:
    rows, sent = 512, list[int]()
    counters = SimpleNamespace(waited_s=0.0)

    def send_step(epoch: int, number: int, data: bytes) -> None:
        sent.append(decode_step(data)[2])

    links: Any = SimpleNamespace(counters=lambda: counters, send_step=send_step)
    members: Any = SimpleNamespace(
        open=lambda start: start(links), step=lambda _: nullcontext(), checking=lambda *_: nullcontext()
    )
    arrival: Any = SimpleNamespace(frame=SimpleNamespace(rows=rows), has_groups=has_groups, data=b"")
    leader = Leader(1, members, lambda _: None)
    with leader.step(arrival, [], bytes(32)):
        assert links.bands == sent[0]
    assert (sent[0] == 1) == has_groups
