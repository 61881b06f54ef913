"""Encodes microbatches and sampled tokens. Stages decode and check them natively (kernels/cpu/native/frames)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import chain

from llamaclust.core import limits
from llamaclust.proto import microbatch_pb2 as microbatch_proto
from llamaclust.wire.microbatch.messages import Chunk, ImageRows, Microbatch, SampledTokens

MAX_MICROBATCH_BYTES = (1 << 23) + limits.MAX_GIVEN_BYTES
MAX_INPUTS_BYTES = 1 << 27
MAX_INPUTS_TOKENS = 1 << 26
MAX_STAGES = 255
MAX_RELEASED = 4 * limits.MAX_SEQUENCES


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
    numbered = tuple(enumerate(chunks))
    followed = ((place, *chunk.depends_on) for place, chunk in numbered if chunk.depends_on is not None)
    message.followed = array("Q", chain.from_iterable(followed)).tobytes()
    if any(chunk.window_table for chunk in chunks):
        message.windows = int32((chunk.window_start, len(chunk.window_table) // 2) for chunk in chunks)
        message.window_tables = int32(chunk.window_table for chunk in chunks)
    message.embedded = int32((place, *chunk.embedded) for place, chunk in numbered if chunk.embedded_rows)
    message.adapters = b"".join(
        array("i", (place, number)).tobytes() + array("f", (scale,)).tobytes()
        for place, chunk in numbered
        for number, scale in chunk.adapters
    )
    if any(chunk.state_to for chunk in chunks):
        message.states_before = int32((-1 if chunk.state_from is None else chunk.state_from,) for chunk in chunks)
        message.states = int32(
            (place, *state)
            for place, chunk in numbered
            for state in zip(chunk.state_to[::2], chunk.state_to[1::2], strict=True)
        )
    message.drafts = int32(
        (place, -1 if chunk.next_token is None else chunk.next_token, chunk.drafts)
        for place, chunk in numbered
        if chunk.drafts or chunk.next_token is not None
    )
    if images := [(place, chunk.images) for place, chunk in numbered if chunk.images is not None]:
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
