"""Wire messages of every kind, and seeded random damage to their bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, StageTiming
from llamaclust.wire.weight_stream import WeightRange, decode_range, encode_missing, encode_range, frames_of
from llamaclust.wire.weight_stream import decode_frame as decode_weights
from support.wire.slow_codec import decode_frame, encode_frame
from support.wire.version_cases import CASES

COUNT = int(os.environ.get("FUZZ_CASES", "2000"))
"""The number of cases per test; docs/internals/security-tests.md says how to run more."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of message: valid messages as bytes, and their decoder."""

    name: str
    good: tuple[bytes, ...]
    decode: Callable[[bytes], Any]


def _frames() -> Kind:
    header = encode_microbatch(Microbatch("m", 1, 0, (Chunk((1, 2), 0, (3, 1), 1),)))
    hidden = np.arange(8, dtype=np.float32).reshape(2, 4)
    timings = (StageTiming(1, 2, 3, 4),)
    good = encode_frame(header, timings, hidden), encode_hidden(header), encode_frame(header, (), failure="no")
    return Kind("Frame", good, decode_frame)


def _weights() -> list[Kind]:
    """Returns the kinds of messages that Fetch streams carry."""
    asked = encode_range(WeightRange("ab" * 32, 7, 1 << 40)), encode_range(WeightRange("00" * 32, 0, 0))
    given = *frames_of(memoryview(bytes(range(64)))), encode_missing("no such weights")
    return [
        Kind("WeightRange", asked, decode_range),
        Kind("WeightFrame", given, lambda data: decode_weights(data, 64)),
    ]


def kinds() -> list[Kind]:
    found = {kind.name: kind for kind in (_frames(), *_weights())}
    for name, message, encode, decode, _ in CASES:
        known = found.get(name, Kind(name, (), decode))
        found[name] = Kind(name, (*known.good, encode(message)), decode)
    return list(found.values())


def damaged(source: random.Random, good: Sequence[bytes]) -> bytes:
    """Returns one of the messages after one to four kinds of damage, or random bytes."""
    data = bytearray(source.choice(good))
    for _ in range(source.randint(1, 4)):
        data = source.choice(_BLOWS)(source, data, good)
    return bytes(data)


def _flip(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    if data:
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return data


def _cut(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    return data[: source.randrange(len(data) + 1)]


def _insert(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    at = source.randrange(len(data) + 1)
    return data[:at] + source.randbytes(source.randint(1, 12)) + data[at:]


def _number(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    """Overwrites bytes with an extreme number: ten bytes of a varint, or four of a fixed number."""
    at = source.randrange(len(data) + 1)
    huge = source.choice(
        [b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\x00\x00\xc0\x7f"]
    )
    return data[:at] + huge + data[at + len(huge) :]


def _splice(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    other = source.choice(good)
    return data[: source.randrange(len(data) + 1)] + other[source.randrange(len(other) + 1) :]


def _repeat(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    return data * source.randint(2, 5)


def _noise(source: random.Random, data: bytearray, good: Sequence[bytes]) -> bytearray:
    return bytearray(source.randbytes(source.randrange(200)))


_BLOWS = (_flip, _flip, _flip, _cut, _insert, _number, _splice, _repeat, _noise)
