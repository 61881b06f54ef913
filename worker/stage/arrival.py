"""A microbatch as a stage receives it: of the usual kind read natively, in one call, all others by the codec.

The native reader (`_native.FrameReader`) takes frames in the form that the codec writes, without states, adapters,
embedded rows or drafts, and within the stage's limits. For what it does not take, the codec says what it is,
or what is wrong with it. Both give backends the same arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.core.errors import WorkerError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS
from llamaclust.kernels._native import FrameReader, MicrobatchFrame
from llamaclust.kernels.backend import Logits, RankedLogits
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES, decode_microbatch
from llamaclust.wire.microbatch.frames import Frame, FrameKind, decode_frame, encode_hidden
from llamaclust.wire.microbatch.messages import Microbatch, StageTiming
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox, newest_dependency

if TYPE_CHECKING:
    from llamaclust.worker.stage.stage_runner import StageRunner


def frame_reader(runner: StageRunner) -> FrameReader | None:
    """None for a stage whose microbatches always have what is not read natively."""
    program, limits = runner.program, runner.limits
    if limits.nextn or limits.state_blocks:
        return None
    assert runner.model_id.isalnum(), "hex digits"
    window = program.window if limits.gives_up(program.window) else None
    return FrameReader(
        runner.model_id,
        max_batch_tokens=limits.max_batch_tokens,
        max_outputs=limits.max_outputs,
        max_sequences=limits.max_sequences,
        max_context_tokens=limits.max_context_tokens,
        kv_blocks=limits.kv_blocks,
        vocabulary=runner.vocabulary,
        window=window or 0,
        window_blocks=limits.window_blocks,
        hidden_width=0 if program.is_first else program.hidden.width,
        max_stages=MAX_STAGES,
        max_rows=MAX_BATCH_TOKENS,
        max_kv_blocks=MAX_KV_BLOCKS,
        max_header_bytes=MAX_MICROBATCH_BYTES,
    )


@dataclass(slots=True)
class Arrival:
    """Received at `received_ns`; `wire_ns`: time to send the one before it."""

    data: bytes
    received_ns: int
    wire_ns: int
    epoch: int
    number: int
    rows: int
    attended: int  # about how many keys its rows look at in all
    newest_dependency: int | None  # the last microbatch that it follows
    native: MicrobatchFrame | None  # None: read by the codec
    _decoded: tuple[Frame, Microbatch] | None

    @classmethod
    def read(cls, data: bytes, reader: FrameReader | None, received_ns: int, wire_ns: int) -> Arrival:
        """ProtocolError for bytes that are no frame of a microbatch."""
        native = None if reader is None else reader.read(data)
        if native is not None:
            depends_on = native.depends_on
            newest = depends_on[-1] if depends_on else None
            place = native.epoch, native.number
            return cls(data, received_ns, wire_ns, *place, native.rows, native.attended, newest, native, None)
        decoded = _decode(data)
        microbatch = decoded[1]
        attended = sum(len(chunk.tokens) * (chunk.position + len(chunk.tokens)) for chunk in microbatch.chunks)
        newest, place = newest_dependency(microbatch), (microbatch.epoch, microbatch.number)
        return cls(data, received_ns, wire_ns, *place, microbatch.rows, attended, newest, None, decoded)

    @property
    def frame(self) -> Frame:
        return self._both[0]

    @property
    def microbatch(self) -> Microbatch:
        return self._both[1]

    @property
    def _both(self) -> tuple[Frame, Microbatch]:
        if self._decoded is None:
            self._decoded = _decode(self.data)
        return self._decoded

    @property
    def failure(self) -> str | None:
        """The line of a frame of a failure."""
        is_failure = self.native is None and self.frame.kind is FrameKind.FAILURE
        return self.frame.failure if is_failure else None

    @property
    def depends_on(self) -> list[int]:
        """The microbatches whose sampled tokens it follows, ascending."""
        if self.native is not None:
            return self.native.depends_on
        return sorted({chunk.depends_on[0] for chunk in self.microbatch.chunks if chunk.depends_on})

    @property
    def is_checked(self) -> bool:
        """Whether numbers of some of its rows were not finite before. Such chunks are never read natively."""
        return self.native is None and any(chunk.checked for chunk in self.microbatch.chunks)

    @property
    def embedded_rows(self) -> int:
        return 0 if self.native is not None else self.microbatch.embedded_rows

    @property
    def timings(self) -> tuple[StageTiming, ...]:
        """Of the stages before this one."""
        if self.native is None:
            return self.frame.timings
        return tuple(StageTiming(*timing) for timing in self.native.timings)

    def run(self, runner: StageRunner, tokens: SampledTokensBox) -> Logits:
        """See `StageRunner.run_to_sample`, on a first stage with the tokens that it follows: later ones read none.
        WorkerError where one of them is not known."""
        program = runner.program
        if self.native is not None and (not program.is_first or tokens.fill_frame(self.native)):
            return runner.run_frame(self.native)
        hidden = self.frame.hidden(self.rows, 0 if program.is_first else program.hidden.width)
        if program.is_first:
            return runner.run_to_sample(tokens.fill(self.microbatch), None)
        return runner.run_to_sample(self.microbatch, hidden)

    def check_fits(self, runner: StageRunner, tokens: SampledTokensBox) -> None:
        """ProtocolError and WorkerError as of `run`, before anything is computed."""
        program = runner.program
        if self.native is not None and (not program.is_first or tokens.fill_frame(self.native)):
            return
        self.frame.hidden(self.rows, 0 if program.is_first else program.hidden.width)
        runner.check_fits(tokens.fill(self.microbatch) if program.is_first else self.microbatch)

    def check(self, hidden: Logits) -> None:
        """WorkerError where the hidden state of a checked chunk, which is never read natively, is not finite."""
        assert not isinstance(hidden, RankedLogits), "those of a last stage"
        row = 0
        for chunk in self.microbatch.chunks if self.native is None else ():
            first, row = row, row + len(chunk.tokens)
            if chunk.checked and not np.isfinite(hidden[first:row]).all():
                place = f"tokens [{chunk.position}, {chunk.position + len(chunk.tokens)})"
                raise WorkerError(f"hidden states of {place} are not finite numbers, twice")

    def next_frame(self, hidden: Logits, timing: StageTiming) -> bytes:
        """For the next stage."""
        assert not isinstance(hidden, RankedLogits), "those of a last stage"
        if self.native is not None:
            return self.native.next_frame(hidden, timing.queue_ns, timing.compute_ns, timing.wire_ns)
        return encode_hidden(self.frame.header, (*self.timings, timing), hidden)


def _decode(data: bytes) -> tuple[Frame, Microbatch]:
    frame = decode_frame(data)
    return frame, decode_microbatch(frame.header)
