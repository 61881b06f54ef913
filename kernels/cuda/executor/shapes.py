"""Buckets of microbatches, by size. The launches of a bucket also serve microbatches with fewer rows."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.model.program import Attention, Program

_EDGES = tuple(1 << power for power in range(12))


@dataclass(frozen=True, slots=True)
class ImageReads:
    """The image inputs that a program reads: given rows (`gives`), RoPE positions with `sections` sections, and row
    groups (`groups`). `looks_ahead` is True if rows always attend to later rows."""

    gives: bool = False
    sections: int = 0
    groups: bool = False
    looks_ahead: bool = False

    @classmethod
    def of(cls, program: Program) -> ImageReads:
        has_kernels = all(step.v is not None for step in program.steps if isinstance(step, Attention))
        return cls(program.given_levels > 0, program.rope_sections, has_kernels, not program.is_causal)


NO_IMAGES = ImageReads()


@dataclass(frozen=True, slots=True)
class Shape:
    """A bucket of microbatches with up to `rows` rows and `outputs` output rows. If `decode`, no two rows belong to the
    same sequence. Microbatches with images may have given rows (`given`), rope positions in sections (`placed`), and
    rows that attend to later rows (`grouped`)."""

    rows: int
    outputs: int
    decode: bool
    given: bool = False
    placed: bool = False
    grouped: bool = False

    @classmethod
    def of(cls, batch: Batch, limits: StageLimits, reads: ImageReads = NO_IMAGES) -> Shape:
        decode = batch.rows == len(batch.sequence_starts) - 1
        grouped = reads.looks_ahead or (reads.groups and batch.groups is not None and not decode)
        return cls(
            _bucket(batch.rows, limits.max_batch_tokens),
            _bucket(len(batch.output_rows), limits.max_outputs),
            decode and not grouped,
            reads.gives and batch.given is not None and len(batch.given.rows) > 0,
            reads.sections > 0 and batch.rope_positions is not None,
            grouped,
        )

    @classmethod
    def with_images(cls, limits: StageLimits, reads: ImageReads) -> Shape:
        outputs = min(limits.max_batch_tokens, limits.max_outputs)
        return cls(
            limits.max_batch_tokens,
            outputs,
            decode=False,
            given=reads.gives,
            placed=reads.sections > 0,
            grouped=reads.groups,
        )

    @classmethod
    def all(cls, limits: StageLimits, *, looks_ahead: bool = False) -> list[Shape]:
        """Returns the buckets that determine buffer sizes: for 1, 2, 4, 8, ... rows, each with and without decode."""
        most = limits.max_batch_tokens
        rows = {_bucket(min(count, most), most) for count in (*_EDGES, most)}
        return [
            cls(count, min(count, limits.max_outputs), decode, grouped=looks_ahead)
            for count in sorted(rows, reverse=True)
            for decode in (False, True)
            if not decode or (count <= limits.max_sequences and not looks_ahead)
        ]


def _bucket(count: int, most: int) -> int:
    """Rounds up to 1, 2, 4, 8, 16, 32, 64, 80, 96, 112, 128, 160, 192 and so on. Never exceeds `most`."""
    if count <= 0:
        return 0
    power = 1 << (count - 1).bit_length()
    step = power // 8 if power > 64 else power
    return min(-(-count // step) * step, most)
