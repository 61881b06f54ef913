"""Encodes microbatches and sampled tokens. Stages decode and check them in native code (kernels/cpu/native/frames)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import chain
from struct import Struct

from llamaclust.core import limits
from llamaclust.proto import microbatch_pb2 as microbatch_proto
from llamaclust.wire.microbatch.messages import Chunk, ImageRows, Microbatch, SampledTokens

MAX_MICROBATCH_BYTES = (1 << 23) + limits.MAX_GIVEN_BYTES
MAX_INPUTS_BYTES = 1 << 27
MAX_INPUTS_TOKENS = 1 << 26
MAX_STAGES = 255
MAX_RELEASED = 4 * limits.MAX_SEQUENCES

_ADAPTER = Struct("<iif")


def encode_microbatch(microbatch: Microbatch) -> bytes:
    chunks = microbatch.chunks
    message = microbatch_proto.Microbatch(
        model_id=microbatch.model_id,
        epoch=microbatch.epoch,
        number=microbatch.number,
        chunks=int32(
            (len(chunk.tokens), chunk.position, chunk.outputs, len(chunk.table) // 2, chunk.checked) for chunk in chunks
        ),
        tokens=int32(chunk.tokens for chunk in chunks),
        tables=int32(chunk.table for chunk in chunks),
    )
    if any(map(_has_more, chunks)):
        _add_sections(chunks, message)
    return message.SerializeToString()


def _has_more(chunk: Chunk) -> bool:
    return (
        chunk.depends_on is not None
        or chunk.next_token is not None
        or chunk.images is not None
        or bool(chunk.window_table or chunk.state_to or chunk.adapters or chunk.drafts or chunk.embedded_rows)
    )


def _add_sections(chunks: tuple[Chunk, ...], message: microbatch_proto.Microbatch) -> None:
    followed: list[int] = []
    embedded: list[int] = []
    adapters = bytearray()
    states: list[int] = []
    drafts: list[int] = []
    images = []
    for place, chunk in enumerate(chunks):
        if chunk.depends_on is not None:
            followed += (place, *chunk.depends_on)
        if chunk.embedded_rows:
            embedded += (place, *chunk.embedded)
        for number, scale in chunk.adapters:
            adapters += _ADAPTER.pack(place, number, scale)
        if chunk.state_to:
            numbers = iter(chunk.state_to)
            for rows, block in zip(numbers, numbers, strict=True):
                states += (place, rows, block)
        if chunk.drafts or chunk.next_token is not None:
            drafts += (place, -1 if chunk.next_token is None else chunk.next_token, chunk.drafts)
        if chunk.images is not None:
            images.append((place, chunk.images))
    message.followed, message.adapters = array("Q", followed).tobytes(), bytes(adapters)
    message.embedded, message.drafts = array("i", embedded).tobytes(), array("i", drafts).tobytes()
    if any(chunk.window_table for chunk in chunks):
        message.windows = int32((chunk.window_start, len(chunk.window_table) // 2) for chunk in chunks)
        message.window_tables = int32(chunk.window_table for chunk in chunks)
    if states:
        message.states = array("i", states).tobytes()
        message.states_before = array("i", [-1 if c.state_from is None else c.state_from for c in chunks]).tobytes()
    if images:
        _add_images(images, message.images)


def _add_images(images: list[tuple[int, ImageRows]], message: microbatch_proto.ImageRows) -> None:
    turned = [(place, each.rope_positions) for place, each in images if each.rope_positions]
    message.given = int32((place, *rows) for place, each in images for rows in each.given)
    message.values = b"".join(each.values for _, each in images)
    message.groups = int32((place, *rows) for place, each in images for rows in each.groups)
    message.rope_chunks = int32((place,) for place, _ in turned)
    message.rope_positions = b"".join(positions for _, positions in turned)


def int32(records: Iterable[Iterable[int]]) -> bytes:
    return array("i", chain.from_iterable(records)).tobytes()


def encode_sampled_tokens(sampled: SampledTokens) -> bytes:
    message = microbatch_proto.SampledTokens(number=sampled.number, tokens=array("i", sampled.tokens).tobytes())
    return message.SerializeToString()
