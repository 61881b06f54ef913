"""Sampling inputs as a last stage receives them: read natively where they are of the usual kind, else by the codec.

The native reader (`_native.InputsReader`) takes tasks without logit biases, chains of samplers and matchers, in the
form that the codec writes and within its bounds. For what it does not take, the codec says what it is, or what is wrong
with it. Both ways sample the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llamaclust.core import limits
from llamaclust.core.sampling import PARAMS
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS, MAX_TOP_K
from llamaclust.kernels._native import InputsReader, MicrobatchFrame, SamplingTasks
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES, MAX_INPUTS_TOKENS, decode_inputs
from llamaclust.wire.microbatch.messages import SamplingInputs
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox


@cache
def inputs_reader() -> InputsReader:
    return InputsReader(
        max_rows=limits.MAX_BATCH_TOKENS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        max_vocabulary=limits.MAX_VOCABULARY,
        max_top_logprobs=limits.MAX_TOP_LOGPROBS,
        max_top_k=MAX_TOP_K,
        max_tokens=MAX_INPUTS_TOKENS,
        max_bytes=MAX_INPUTS_BYTES,
        reals=tuple((row.low, row.high) for row in PARAMS.values() if not row.is_whole),
    )


@dataclass(slots=True)
class StepInputs:
    """Of microbatch (epoch, number)."""

    data: bytes
    epoch: int
    number: int
    native: SamplingTasks | None  # None: read by the codec
    _decoded: SamplingInputs | None

    @classmethod
    def read(cls, data: bytes) -> StepInputs:
        """ProtocolError for bytes that are no sampling inputs."""
        native = inputs_reader().read(data)
        if native is not None:
            return cls(data, native.epoch, native.number, native, None)
        decoded = decode_inputs(data)
        return cls(data, decoded.epoch, decoded.number, None, decoded)

    def tasks(self, frame: MicrobatchFrame, tokens: SampledTokensBox) -> SamplingTasks | None:
        """With what the frame's own tokens add to histories. None where one of both is not native, or they do not fit
        together: the codec's way says why."""
        tasks = self.native
        if tasks is None or (tasks.needs_tokens and not (tokens.fill_frame(frame) and tasks.complete(frame))):
            return None
        return tasks

    @property
    def inputs(self) -> SamplingInputs:
        if self._decoded is None:
            self._decoded = decode_inputs(self.data)
        return self._decoded
