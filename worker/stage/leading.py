"""The leader of a group. It has the stage's streams, and announces each step before computing its own portion."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from time import perf_counter

from llamaclust.core.errors import LlamaclustError, ProtocolError, WorkerError
from llamaclust.kernels._native import Gatherer, LinkError, Links
from llamaclust.kernels.gathers import LEAST_BANDED_ROWS, MOST_BANDS
from llamaclust.model.program import Program
from llamaclust.wire.microbatch.codec import encode_sampled_tokens
from llamaclust.wire.microbatch.messages import SampledTokens
from llamaclust.worker.groups.bands import BandChoice
from llamaclust.worker.groups.member_links import MemberLinks
from llamaclust.worker.stage.arrival import Arrival
from llamaclust.worker.stage.dependencies import MOST_IN_FLIGHT, SampledTokensBox, read_sampled_tokens

_LENGTH = struct.Struct("<I")
_COUNT_AT = _LENGTH.size + sha256().digest_size


class MemberFailedError(LlamaclustError):
    """A member failed during a step, and can no longer take part in the other members' gathers."""


class Leader:
    """Announces the steps of one epoch, once the group's links are open. Only one thread may use it at a time."""

    def __init__(self, epoch: int, links: MemberLinks, gather_by: Callable[[Gatherer], None]) -> None:
        self._epoch = epoch
        self._member_links = links
        self._gather_by = gather_by
        self._steps = 0
        self._choice = BandChoice()
        self._links: Links | None = None
        links.open(self._start)

    def _start(self, links: Links) -> None:
        self._gather_by(links)
        self._links = links

    @contextmanager
    def step(
        self, arrival: Arrival, followed: Sequence[SampledTokens], adapters: bytes, checked: Program | None = None
    ) -> Iterator[None]:
        """Announces a microbatch. `followed` has the sampled tokens that it needs. `adapters` is the digest of all
        members' adapters. The `with` body computes the microbatch. If `checked` (the stage's program) is given, a
        LinkError names a member that sent NaN or infinity. Raises LinkError, WorkerError or MemberFailedError."""
        assert self._links is not None, "a stream is accepted when the links are open"
        rows = arrival.frame.rows
        is_whole = rows >= LEAST_BANDED_ROWS and arrival.has_groups
        self._links.bands = bands = 1 if is_whole else self._choice.of(rows)
        self._links.send_step(self._epoch, self._steps, encode_step(arrival.data, followed, bands, adapters))
        self._steps += 1
        waited_s, begun_s = self._links.counters().waited_s, perf_counter()
        try:
            with self._member_links.step(rows), self._member_links.checking(checked, rows, self._gather_by):
                yield
            waited_s = self._links.counters().waited_s - waited_s
            if not is_whole:
                self._choice.add(rows, waited_s / (perf_counter() - begun_s))
        except (LinkError, WorkerError):
            raise
        except Exception as error:
            raise MemberFailedError(f"{type(error).__name__}: {error}") from error


def encode_step(frame: bytes, followed: Sequence[SampledTokens], bands: int, adapters: bytes) -> bytes:
    """Encodes a step as the number of bands, the digest of the adapters, the number of token messages, (length,
    message) pairs, and the frame."""
    parts = [_LENGTH.pack(bands), adapters, _LENGTH.pack(len(followed))]
    for sampled in followed:
        tokens = encode_sampled_tokens(sampled)
        parts += _LENGTH.pack(len(tokens)), tokens
    return b"".join((*parts, frame))


def decode_step(data: bytes) -> tuple[bytes, SampledTokensBox, int, bytes]:
    box, at = SampledTokensBox(), _COUNT_AT + _LENGTH.size
    bands = _number(data, 0, MOST_BANDS)
    if bands == 0:
        raise ProtocolError("a step's message divides its rows into 0 bands; expected at least 1")
    for _ in range(_number(data, _COUNT_AT, MOST_IN_FLIGHT)):
        begin = at + _LENGTH.size
        at = begin + _number(data, at, len(data))
        box.put(read_sampled_tokens(data[begin:at]))
    return data[at:], box, bands, data[_LENGTH.size : _COUNT_AT]


def _number(data: bytes, at: int, most: int) -> int:
    if len(data) < at + _LENGTH.size:
        raise ProtocolError(f"a step's message is incomplete: it ends after {len(data)} bytes")
    (number,) = _LENGTH.unpack_from(data, at)
    if number > most:
        raise ProtocolError(f"a step's message has a count or size of {number}; the limit is {most}")
    return int(number)
