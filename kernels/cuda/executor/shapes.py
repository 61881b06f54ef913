"""Buckets of microbatches. Launches are made and captured for the rows of a bucket, and also serve fewer rows."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch

_EDGES = tuple(1 << power for power in range(12))


@dataclass(frozen=True, slots=True)
class Shape:
    """A bucket: the most rows and output rows. In `decode`, each row belongs to another sequence."""

    rows: int
    outputs: int
    decode: bool

    @classmethod
    def of(cls, batch: Batch, limits: StageLimits) -> Shape:
        decode = batch.rows == len(batch.sequence_starts) - 1
        outputs = _bucket(len(batch.output_rows), limits.max_outputs)
        return cls(_bucket(batch.rows, limits.max_batch_tokens), outputs, decode)

    @classmethod
    def all(cls, limits: StageLimits) -> list[Shape]:
        """Returns buckets that have every kind of launch at its largest: few and many rows, with and without decode."""
        most = limits.max_batch_tokens
        rows = {_bucket(min(count, most), most) for count in (*_EDGES, most)}
        return [
            cls(count, min(count, limits.max_outputs), decode)
            for count in sorted(rows, reverse=True)
            for decode in (False, True)
            if not decode or count <= limits.max_sequences
        ]


def _bucket(count: int, most: int) -> int:
    """Rounds up to a power of two; above 64, to one of four steps between powers of two. Never exceeds `most`."""
    if count <= 0:
        return 0
    power = 1 << (count - 1).bit_length()
    step = power // 8 if power > 64 else power
    return min(-(-count // step) * step, most)
