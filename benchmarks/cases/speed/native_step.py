from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter_ns
from typing import Final

import numpy as np
from runner.case import Case, Group, Measures, option
from runner.options import listed, positive

from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS, StageLimits
from llamaclust.core.sampler.bounds import MAX_VOCABULARY
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import MatcherRow, SampleTask
from llamaclust.kernels import _native
from llamaclust.kernels.sampling import Sampler
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES, encode_microbatch, encode_sampled_tokens
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SampledTokens, SamplingInputs
from llamaclust.wire.microbatch.results import decode_result
from llamaclust.worker.stage.dependencies import SampledTokensBox
from llamaclust.worker.stage.stage_runner import batch_of
from llamaclust.worker.stage.step_inputs import StepInputs

_MODEL_ID: Final = "ab" * 32
_WIDTH, _VOCABULARY, _POSITION = 576, 32, 300
_LIMITS = StageLimits(max_batch_tokens=64, max_outputs=16, max_sequences=16, max_context_tokens=512, kv_blocks=512)
KINDS: Final[Mapping[str, Callable[[Chunk, int], Chunk]]] = {
    "plain": lambda chunk, row: chunk,
    "states": lambda chunk, row: replace(chunk, state_from=2 * row, state_to=(1, 2 * row + 1)),
    "adapters": lambda chunk, row: replace(chunk, adapters=((1, 0.5),)),
    "drafts": lambda chunk, row: replace(chunk, drafts=4),
    "matchers": lambda chunk, row: chunk,
}


class Step:
    def __init__(self, rows: int, kind: str) -> None:
        blocks = _LIMITS.max_context_tokens // 16
        plain = (Chunk((0,), _POSITION, (row * blocks, blocks), 1, (0, row)) for row in range(rows))
        chunks = tuple(KINDS[kind](chunk, row) for row, chunk in enumerate(plain))
        self._microbatch = Microbatch(_MODEL_ID, 1, 1, chunks)
        matchers = (MatcherRow(row, 7) if kind == "matchers" else None for row in range(rows))
        params = SamplingParams(temperature=0.8)
        tasks = (SampleTask(params, row, 0, _POSITION, matcher=matcher) for row, matcher in enumerate(matchers))
        self._inputs = SamplingInputs(1, 1, tuple(tasks))
        self._frame, self._tasks = encode_hidden(encode_microbatch(self._microbatch)), encode_inputs(self._inputs)
        self._tokens = SampledTokensBox()
        self._tokens.put(SampledTokens(0, tuple(range(rows))))
        self._sampled = encode_sampled_tokens(SampledTokens(0, tuple(range(rows))))
        self._hidden = np.ones((rows, _WIDTH), np.float32)
        self._logits = np.random.default_rng(0).standard_normal((rows, _VOCABULARY), np.float32)
        self._sampler = Sampler(_VOCABULARY)
        self._rows = rows
        self._reader = _native.FrameReader(
            _MODEL_ID,
            max_batch_tokens=_LIMITS.max_batch_tokens,
            max_outputs=_LIMITS.max_outputs,
            max_sequences=_LIMITS.max_sequences,
            max_context_tokens=_LIMITS.max_context_tokens,
            kv_blocks=_LIMITS.kv_blocks,
            vocabulary=_VOCABULARY,
            window=0,
            window_blocks=0,
            state_blocks=64 if kind == "states" else 0,
            adapters=2,
            hidden_width=0,
            given_width=0,
            rope_sections=0,
            max_stages=MAX_STAGES,
            max_rows=MAX_BATCH_TOKENS,
            max_kv_blocks=MAX_KV_BLOCKS,
            max_drafts=32,
            max_scale=1000.0,
            max_header_bytes=MAX_MICROBATCH_BYTES,
            max_failure_bytes=1 << 14,
        )
        self._read = self._reader.read(self._frame)
        self._result = self.result()

    @property
    def parts(self) -> Mapping[str, Callable[[], object]]:
        return {
            "write": lambda: encode_hidden(encode_microbatch(self._microbatch)),
            "frames": self.frames,
            "arrays": lambda: batch_of(self._read),
            "inputs out": lambda: encode_inputs(self._inputs),
            "inputs in": lambda: StepInputs.read(self._tasks).tasks.matcher_rows,
            "sample": self.result,
            "result in": lambda: decode_result(self._result),
            "tokens in": lambda: _native.read_sampled_tokens(self._sampled, MAX_BATCH_TOKENS, MAX_VOCABULARY),
        }

    def frames(self) -> bytes:
        frame = self._reader.read(self._frame)
        self._tokens.fill(frame)
        return frame.next_frame(self._hidden, 1000, 2_000_000, 3000)

    def result(self) -> bytes:
        tasks = StepInputs.read(self._tasks).tasks
        tasks.complete(self._read)
        outcomes = self._sampler.sample(self._logits, tasks)
        SampledTokens(1, tuple(outcomes.tokens))
        return outcomes.result(self._read, (1000, 2_000_000, 3000, self._rows))


@dataclass(frozen=True)
class NativeStep(Case):
    """Measures the messages of a decode step: the coordinator writes them, and a stage reads them. Nothing is computed.
    Figures are microseconds per call in a loop, with warm caches. The model has 576 channels and a vocabulary of 32
    tokens. Rows are plain, or have states, adapters, an MTP head's drafts, or grammars (without matching)."""

    rounds = 9
    rows: tuple[int, ...] = option((1, 8), "numbers of rows in a microbatch", listed(positive))
    calls: int = option(200, "number of calls in a turn", positive)

    async def groups(self) -> AsyncIterator[Group]:
        for rows in self.rows:
            yield Group(
                f"{rows} rows, us",
                {kind: partial(self._measure, Step(rows, kind).parts) for kind in KINDS},
                {"all": ""},
            )

    async def _measure(self, parts: Mapping[str, Callable[[], object]], turn: int) -> Measures:
        found = {name: _microseconds(call, self.calls) for name, call in parts.items()}
        return {"all": sum(found.values()), **found}


def _microseconds(call: Callable[[], object], calls: int) -> float:
    begun_ns = perf_counter_ns()
    for _ in range(calls):
        call()
    return (perf_counter_ns() - begun_ns) / calls / 1e3
