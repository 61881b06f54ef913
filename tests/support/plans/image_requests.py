"""Requests with images for schedulers on fake stages, and a fake model whose tokens depend on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from random import Random

import numpy as np

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, answer

IMAGE_WIDTH, SECTIONS = 3, 3
Seen = tuple[int, tuple[int, ...], bytes, int]
"""A row's inputs: its token, its rope positions, the values in place of its embedding, and the end of its group."""


class SeeingModel(FakeModel):
    """A fake model with the inputs of rows in KV blocks: other values, rope positions or groups give other tokens."""

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        chunks = tuple(replace(chunk, tokens=tuple(_codes(chunk))) for chunk in microbatch.chunks)
        return super().run(replace(microbatch, chunks=chunks), inputs)


def _codes(chunk: Chunk) -> Iterator[int]:
    images, count = chunk.images, len(chunk.tokens)
    values: dict[int, bytes] = {}
    ends: dict[int, int] = {}
    rope = [(position,) * SECTIONS for position in range(chunk.position, chunk.position + count)]
    if images is not None:
        rows = [row for part in images.given for row in range(*part)]
        given = np.frombuffer(images.values, np.float32).reshape(len(rows), IMAGE_WIDTH)
        values = {row: value.tobytes() for row, value in zip(rows, given, strict=True)}
        ends = {row: chunk.position + end for first, end in images.groups for row in range(first, end)}
        if images.rope_positions:
            turned = np.frombuffer(images.rope_positions, np.int32).reshape(count, SECTIONS)
            rope = [tuple(row) for row in turned.tolist()]
    for row, token in enumerate(chunk.tokens):
        yield code((token, rope[row], values.get(row, b""), ends.get(row, 0)), chunk.position + row)


def code(seen: Seen, position: int) -> int:
    """Returns the token itself if the row is like a row of text, else a hash."""
    if seen[1:] == ((position,) * SECTIONS, b"", 0):
        return seen[0]
    return int.from_bytes(sha256(repr(seen).encode()).digest()[:7])


def seen_by(request: GenerationRequest, length: int) -> list[Seen]:
    """Returns the inputs of the first `length` rows of the prompt and an answer of zeros, by a plain formula."""
    rows: list[Seen] = []
    spans = {span.start: span for span in request.images}
    rope = 0  # of the next row
    while len(rows) < length:
        if (span := spans.get(len(rows))) is None:
            token = request.prompt[len(rows)] if len(rows) < len(request.prompt) else 0
            rows.append((token, (rope,) * SECTIONS, b"", 0))
            rope += 1
            continue
        end = span.end if span.is_bidirectional else 0
        for index, row in enumerate(span.rows):
            places = index if span.rope_positions is None else span.rope_positions[:, index]
            turned = tuple((np.array([rope] * SECTIONS) + places).tolist())
            rows.append((0, turned, row.tobytes(), end))
        rope += len(span.rows) if span.rope_positions is None else int(span.rope_positions.max()) + 1
    return rows


def expected_tokens(request: GenerationRequest) -> list[int]:
    """Returns the fake model's answer to a request that is computed alone, row by row."""
    end = len(request.prompt) + request.max_new_tokens
    rows, tokens, window = seen_by(request, end), list(request.prompt), request.history_window
    is_text = [not row[2] for row in rows]
    while len(tokens) < end:
        history = [token for token, text in zip(tokens, is_text, strict=False) if text][-window:] if window else []
        task = SampleTask(
            request.params,
            request.seed,
            request.choice,
            position=len(tokens),
            history=tuple(history),
            penalty_window=request.penalty_window if request.params.needs_history else None,
        )
        codes = [code((token, *row[1:]), place) for place, (token, row) in enumerate(zip(tokens, rows, strict=False))]
        tokens.append(answer(codes, task).token)
    return tokens[len(request.prompt) :]


def picture(number: int, rows: int, *, bidirectional: bool = False, turned: bool = False) -> ImageSpan:
    """Builds an image at position 0; equal arguments give equal images."""
    values = np.random.default_rng([number, rows]).standard_normal((rows, IMAGE_WIDTH)).astype(np.float32)
    positions = None
    if turned:
        width = max(1, rows // 3)
        positions = np.stack([np.zeros(rows, int), np.arange(rows) // width, np.arange(rows) % width]).astype(np.int32)
    digest = sha256(repr((number, rows, bidirectional, turned)).encode()).digest()
    return ImageSpan(0, rows, values, digest, bidirectional, positions)


def with_pictures(request: GenerationRequest, pictures: Sequence[tuple[int, ImageSpan]]) -> GenerationRequest:
    """Returns the request with each image before the token at its place in the prompt; places ascend."""
    prompt, spans, added = list(request.prompt), [], 0
    for place, span in pictures:
        start, count = place + added, len(span.rows)
        prompt[start:start] = [0] * count
        spans.append(replace(span, start=start, end=start + count))
        added += count
    return replace(request, prompt=tuple(prompt), images=tuple(spans))


def random_pictures(source: Random, places: int, most_rows: int, *, kind: str) -> list[tuple[int, ImageSpan]]:
    """Returns one to three of four images of a kind (plain, turned, bidirectional), at random places up to `places`."""
    rows = [1 + (most_rows - 1) * number // 4 for number in range(1, 5)]
    found = []
    for place in sorted(source.randint(0, places) for _ in range(source.randint(1, 3))):
        number = source.randrange(4)
        span = picture(number, rows[number], bidirectional=kind == "bidirectional", turned=kind == "turned")
        found.append((place, span))
    return found


def text(source: Random, length: int) -> tuple[int, ...]:
    return tuple(1 + source.randrange(VOCABULARY - 1) for _ in range(length))
