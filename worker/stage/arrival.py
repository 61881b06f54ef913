"""A microbatch as a stage receives it. Native code decodes and checks it for all backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.core.bounds import MAX_TEXT, line
from llamaclust.core.errors import WorkerError
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_BATCH_TOKENS, MAX_KV_BLOCKS, StageLimits
from llamaclust.core.sampler.bounds import MAX_DRAFTED_TOKENS
from llamaclust.kernels._native import FrameReader, MicrobatchFrame
from llamaclust.kernels.backend import Logits, RankedLogits
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES
from llamaclust.wire.microbatch.messages import StageTiming

if TYPE_CHECKING:
    from llamaclust.model.loader import Model
    from llamaclust.model.program import Program


def frame_reader(program: Program, limits: StageLimits, model: Model, vocabulary: int) -> FrameReader:
    return FrameReader(
        model.model_id,
        max_batch_tokens=limits.max_batch_tokens,
        max_outputs=limits.max_outputs,
        max_sequences=limits.max_sequences,
        max_context_tokens=limits.max_context_tokens,
        kv_blocks=limits.kv_blocks,
        vocabulary=vocabulary,
        window=program.window or 0 if limits.gives_up(program.window) else 0,
        window_blocks=limits.window_blocks,
        state_blocks=limits.state_blocks,
        adapters=max(model.adapters, default=-1) + 1,
        hidden_width=0 if program.is_first else program.hidden.width,
        given_width=model.image_width,
        rope_sections=model.rope_sections,
        max_stages=MAX_STAGES,
        max_rows=MAX_BATCH_TOKENS,
        max_kv_blocks=MAX_KV_BLOCKS,
        max_drafts=MAX_DRAFTED_TOKENS,
        max_scale=MAX_ADAPTER_SCALE,
        max_header_bytes=MAX_MICROBATCH_BYTES,
        max_failure_bytes=4 * MAX_TEXT,
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A microbatch received at `received_ns`. Sending the previous answer took `wire_ns` nanoseconds."""

    data: bytes
    frame: MicrobatchFrame
    received_ns: int
    wire_ns: int
    newest_dependency: int | None  # Number of the newest microbatch whose tokens this one needs.

    @classmethod
    def read(cls, data: bytes, reader: FrameReader, received_ns: int, wire_ns: int) -> Arrival:
        frame = reader.read(data)
        return cls(data, frame, received_ns, wire_ns, max(frame.depends_on, default=None))

    @property
    def has_groups(self) -> bool:
        """True if rows attend to later rows. Such rows must not be divided into bands."""
        *_, groups, _ = self.frame.arrays
        return groups is not None

    @property
    def failure(self) -> str | None:
        failure = self.frame.failure
        return None if failure is None else line("failure", failure)

    def check(self, hidden: Logits) -> None:
        assert not isinstance(hidden, RankedLogits), "those of a last stage"
        for chunk in self.frame.checked_chunks:
            _, positions, starts, *_ = self.frame.arrays
            first, end = starts[chunk], starts[chunk + 1]
            if not np.isfinite(hidden[first:end]).all():
                place = f"tokens [{positions[first]}, {positions[end - 1] + 1})"
                raise WorkerError(f"hidden states of {place} were not finite, even when computed again")

    def next_frame(self, hidden: Logits, timing: StageTiming) -> bytes:
        assert not isinstance(hidden, RankedLogits), "those of a last stage"
        return self.frame.next_frame(hidden, timing.queue_ns, timing.compute_ns, timing.wire_ns)
