"""What the leader of a group tells the other members before each step: the microbatch, and the tokens that it follows.

The message is the most bands of rows, the number of tokens' messages, each of these behind its length, and the frame as
the leader received it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from llamaclust.core.errors import ProtocolError
from llamaclust.kernels.gathers import MOST_BANDS
from llamaclust.wire.microbatch.codec import encode_sampled_tokens
from llamaclust.wire.microbatch.messages import SampledTokens
from llamaclust.worker.stage.sampled_tokens import MOST_IN_FLIGHT, SampledTokensBox, read_sampled_tokens

_LENGTH = struct.Struct("<I")


def encode_step(frame: bytes, followed: Sequence[SampledTokens], bands: int) -> bytes:
    """The message of a step in that many bands at most; `followed`: tokens of the microbatches that it depends on, in
    number order."""
    parts = [_LENGTH.pack(bands), _LENGTH.pack(len(followed))]
    for sampled in followed:
        tokens = encode_sampled_tokens(sampled)
        parts += _LENGTH.pack(len(tokens)), tokens
    return b"".join((*parts, frame))


def decode_step(data: bytes) -> tuple[bytes, SampledTokensBox, int]:
    """The frame, the tokens that it follows, and the bands. ProtocolError for bytes that are no message of a step."""
    box, at = SampledTokensBox(), 2 * _LENGTH.size
    bands = _number(data, 0, MOST_BANDS)
    if bands == 0:
        raise ProtocolError("a step's message with no band of rows")
    for _ in range(_number(data, _LENGTH.size, MOST_IN_FLIGHT)):
        begin = at + _LENGTH.size
        at = begin + _number(data, at, len(data))
        box.put(read_sampled_tokens(data[begin:at]))
    return data[at:], box, bands


def _number(data: bytes, at: int, most: int) -> int:
    if len(data) < at + _LENGTH.size:
        raise ProtocolError(f"a step's message of {len(data)} bytes, which ends within its parts")
    (number,) = _LENGTH.unpack_from(data, at)
    if number > most:
        raise ProtocolError(f"a step's message with {number} parts or bytes, at most {most}")
    return int(number)
