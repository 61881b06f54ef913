"""What a last stage answers to a microbatch: results of its output rows as bytes, and the tokens that it sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamaclust.core.sampling import RowResult
from llamaclust.kernels._native import MicrobatchFrame, RowOutcomes
from llamaclust.wire.microbatch.codec import encode_result
from llamaclust.wire.microbatch.messages import Result, SampledTokens, StageTiming
from llamaclust.worker.stage.sampled_tokens import sampled_tokens_of

if TYPE_CHECKING:
    from llamaclust.worker.stage.arrival import Arrival


@dataclass(frozen=True, slots=True)
class Outputs:
    """As `Result` has them."""

    rows: tuple[RowResult, ...]
    embeddings: bytes = b""
    drafting_ns: int = 0

    def encode(self, arrival: Arrival, timing: StageTiming) -> bytes:
        timings = (*arrival.timings, timing)
        place = arrival.epoch, arrival.number
        return encode_result(
            Result(*place, self.rows, timings, embeddings=self.embeddings, drafting_ns=self.drafting_ns)
        )

    def sampled(self, number: int) -> SampledTokens | None:
        """None where there are no output rows."""
        return sampled_tokens_of(number, self.rows) if self.rows else None


@dataclass(frozen=True, slots=True)
class NativeOutputs:
    """Of a frame and tasks that were read natively. No row failed: the codec has the form for that."""

    frame: MicrobatchFrame
    outcomes: RowOutcomes
    drafting_ns: int = 0

    def encode(self, _: Arrival, timing: StageTiming) -> bytes:
        """The bytes that the codec makes of the same result."""
        return self.outcomes.result(self.frame, timing.queue_ns, timing.compute_ns, timing.wire_ns)

    def sampled(self, number: int) -> SampledTokens | None:
        """None where there are no output rows."""
        tokens = self.outcomes.tokens
        return SampledTokens(number, tuple(tokens)) if tokens else None
