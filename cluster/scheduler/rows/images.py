from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan, SpanPlaces
from llamaclust.wire.microbatch.messages import ImageRows


@dataclass(frozen=True, slots=True)
class _Placed:
    """An image span. RoPE position minus token position is `before` in text before it and `after` in text after it."""

    span: ImageSpan
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class _Part:
    placed: _Placed
    first: int
    end: int

    @property
    def span(self) -> ImageSpan:
        return self.placed.span

    @property
    def within(self) -> slice:
        return slice(self.first - self.span.start, self.end - self.span.start)


class SequenceImages:
    def __init__(self, spans: Sequence[ImageSpan]) -> None:
        self._placed, self._places = _placed(spans), SpanPlaces(spans)
        self._sections = max((len(s.rope_positions) for s in spans if s.rope_positions is not None), default=0)

    def rows_of(self, position: int, count: int) -> ImageRows | None:
        parts = [*self._parts(position, position + count)]
        rope_positions = self._rope_positions(position, parts, count)
        if not parts and not rope_positions:
            return None
        return ImageRows(
            tuple((part.first - position, part.end - position) for part in parts),
            b"".join(np.ascontiguousarray(part.span.rows[part.within], "<f4").data for part in parts),
            tuple((part.first - position, part.end - position) for part in parts if part.span.is_bidirectional),
            rope_positions,
        )

    def fitting(self, position: int, rows: int, most_rows: int, most_bytes: int) -> int:
        """Returns how many of the next `rows` rows fit into a microbatch. If an image's rows attend to each other, they
        stay together, so the result may exceed `rows`, up to `most_rows`."""
        chunk_end = position + rows
        for part in self._parts(position, chunk_end):
            span, end = part.span, part.end
            if span.is_bidirectional and part.first == position and span.end - position <= most_rows:
                end = span.end
                chunk_end = max(chunk_end, end)
            fit = most_bytes // span.row_bytes
            if span.is_bidirectional and (end < span.end or end - part.first > fit):
                return part.first - position
            if end - part.first > fit:
                return part.first + fit - position
            most_bytes -= (end - part.first) * span.row_bytes
        return chunk_end - position

    def begins_with_group(self, position: int) -> bool:
        return any(part.span.is_bidirectional for part in self._parts(position, position + 1))

    def _parts(self, start: int, end: int) -> Iterator[_Part]:
        for number in self._places.within(start, end):
            placed = self._placed[number]
            yield _Part(placed, max(placed.span.start, start), min(placed.span.end, end))

    def _rope_positions(self, position: int, parts: Sequence[_Part], count: int) -> bytes:
        if self._sections == 0:
            return b""
        own = np.arange(position, position + count, dtype="<i4")
        turned: NDArray[np.int32] = np.repeat(own[:, None], self._sections, axis=1)
        turned += self._before(position)
        for part in parts:
            after = part.span.end - position
            turned[after:] = own[after:, None] + part.placed.after
            if (relative := part.span.rope_positions) is not None:
                first = part.span.start + part.placed.before
                turned[part.first - position : part.end - position] = first + relative[:, part.within].T
        return b"" if (turned == own[:, None]).all() else turned.tobytes()

    def _before(self, position: int) -> int:
        first = self._places.within(position, position + 1).start
        return self._placed[first - 1].after if first else 0


def _placed(spans: Sequence[ImageSpan]) -> list[_Placed]:
    placed, before = [], 0
    for span in spans:
        after = before
        if span.rope_positions is not None:
            after += int(span.rope_positions.max()) + 1 - (span.end - span.start)
        placed.append(_Placed(span, before, after))
        before = after
    return placed
