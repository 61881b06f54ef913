"""The table of all RPC methods, with their allowed callers, their limits on open streams, and their message sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from llamaclust.core.limits import MAX_TILE_PIXELS, MAX_WORKERS
from llamaclust.wire import encoder
from llamaclust.wire.control.codec import MAX_CONTROL_BYTES
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES, MAX_MICROBATCH_BYTES
from llamaclust.wire.microbatch.frames import MAX_FRAME_BYTES
from llamaclust.wire.weight_stream import ASKED_BYTES, FRAME_BYTES

JOIN = "/llamaclust.v1.Coordinator/Join"
FORWARD = "/llamaclust.v1.Stage/Forward"
SAMPLE = "/llamaclust.v1.Stage/Sample"
SAMPLED_TOKENS = "/llamaclust.v1.Stage/SampledTokens"
ENCODE = "/llamaclust.v1.Stage/Encode"
ECHO = "/llamaclust.v1.Stage/Echo"
FETCH = "/llamaclust.v1.Weights/Fetch"

PIECE_BYTES = 1 << 20
"""The maximum size of a gRPC message. A longer message is sent in pieces, of which the last is shorter or empty."""
PROBE_BYTES = 1 << 19
FETCH_STREAMS = 2
"""Streams from a worker to each source of weights. One can transfer while the other's bytes are checked and written."""


class Callers(Enum):
    """The members that may open a method's streams. Without certificates, every member may open all streams."""

    MEMBERS = "any member"
    COORDINATOR = "the coordinator"
    NEIGHBOUR = "the previous stage or the last stage, as named in the coordinator's order"
    PERMITTED = "the coordinator, and workers that have its permit to measure this link"


@dataclass(frozen=True, slots=True)
class Method:
    """The limits of one method. `streams` limits all open streams. `streams_of_caller` limits those of one caller."""

    callers: Callers
    streams: int
    streams_of_caller: int
    request_bytes: int  # Maximum size of a message to the server.
    reply_bytes: int  # Maximum size of a message to the caller.


METHODS: Mapping[str, Method] = {
    JOIN: Method(Callers.MEMBERS, 1024, 4, MAX_CONTROL_BYTES, MAX_CONTROL_BYTES),
    FORWARD: Method(Callers.NEIGHBOUR, 256, 256, MAX_FRAME_BYTES, 0),
    SAMPLE: Method(Callers.COORDINATOR, 256, 256, MAX_INPUTS_BYTES, MAX_INPUTS_BYTES),
    SAMPLED_TOKENS: Method(Callers.NEIGHBOUR, 256, 256, MAX_MICROBATCH_BYTES, 0),
    ENCODE: Method(Callers.COORDINATOR, 32, 32, encoder.tile_bytes(MAX_TILE_PIXELS), encoder.FRAME_BYTES + 1),
    ECHO: Method(Callers.PERMITTED, 64, 2, PROBE_BYTES, 64),
    FETCH: Method(Callers.MEMBERS, FETCH_STREAMS * MAX_WORKERS, 16, ASKED_BYTES, FRAME_BYTES + 1),
}


def served_bytes(methods: Mapping[str, object]) -> int:
    return min(PIECE_BYTES, max((METHODS[method].request_bytes for method in methods), default=0))
