"""What a step is beside its computing: messages of one decode step read and written by the codec, and natively.

    python benchmarks/native_step.py [--rows 1,8] [--rounds 9] [--calls 200]

Microseconds of a call in a loop, where the caches hold all of it: medians of rounds, both ways in turns. A microbatch
follows another one whose tokens are filled in, in a model 576 wide; rows are sampled from 32 words. Both ways write the
same bytes, which is checked first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np
from measuring.options import listed, positive

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS, MAX_VOCABULARY, StageLimits
from llamaclust.core.sampling import SampleTask, SamplingParams
from llamaclust.kernels import _native
from llamaclust.kernels.sampling import Sampler
from llamaclust.wire.microbatch.codec import (
    MAX_MICROBATCH_BYTES,
    MAX_STAGES,
    decode_inputs,
    decode_sampled_tokens,
    encode_inputs,
    encode_microbatch,
    encode_result,
    encode_sampled_tokens,
)
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SampledTokens, SamplingInputs, StageTiming
from llamaclust.worker.stage.arrival import Arrival
from llamaclust.worker.stage.batches import build_batch
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox, sampled_tokens_of
from llamaclust.worker.stage.step_inputs import inputs_reader

_MODEL_ID: Final = "ab" * 32
_WIDTH, _VOCABULARY, _POSITION = 576, 32, 300
_LIMITS = StageLimits(max_batch_tokens=64, max_outputs=16, max_sequences=16, max_context_tokens=512, kv_blocks=512)


@dataclass(frozen=True, slots=True)
class Part:
    """Of a step, by both ways, which return the same."""

    name: str
    codec: Callable[[], object]
    native: Callable[[], object]


class Step:
    """Microbatch 1, of `rows` sequences that follow microbatch 0."""

    def __init__(self, rows: int) -> None:
        blocks = _LIMITS.max_context_tokens // 16
        chunks = tuple(Chunk((0,), _POSITION, (row * blocks, blocks), 1, (0, row)) for row in range(rows))
        self._frame = encode_hidden(encode_microbatch(Microbatch(_MODEL_ID, 1, 1, chunks)), (), None)
        self._sampled = encode_sampled_tokens(SampledTokens(0, tuple(range(rows))))
        self._tokens = SampledTokensBox()
        self._tokens.put(SampledTokens(0, tuple(range(rows))))
        tasks = tuple(SampleTask(SamplingParams(temperature=0.8), row, 0, _POSITION) for row in range(rows))
        self._tasks = tasks
        self._timing = StageTiming(1000, 2_000_000, 3000, rows)
        self._inputs = encode_inputs(SamplingInputs(1, 1, tasks))
        self._hidden = np.ones((rows, _WIDTH), np.float32)
        self._logits = np.random.default_rng(0).standard_normal((rows, _VOCABULARY), np.float32)
        self._sampler = Sampler(_VOCABULARY)
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
            hidden_width=0,
            max_stages=MAX_STAGES,
            max_rows=MAX_BATCH_TOKENS,
            max_kv_blocks=MAX_KV_BLOCKS,
            max_header_bytes=MAX_MICROBATCH_BYTES,
        )
        frame, native_tasks = self._reader.read(self._frame), inputs_reader().read(self._inputs)
        assert frame is not None and native_tasks is not None, "they are of the usual kind"
        self._native_frame, self._native_tasks = frame, native_tasks

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("frame read, tokens filled in, arrays, next frame", self._frames, self._native_frames),
            Part("sampling inputs read", lambda: decode_inputs(self._inputs).number, self._native_inputs),
            Part("32 words sampled, result written", self._results, self._native_results),
            Part("sampled tokens read", self._read_tokens, self._native_read_tokens),
        )

    def _frames(self) -> bytes:
        arrival = Arrival.read(self._frame, None, 0, 0)
        build_batch(self._tokens.fill(arrival.microbatch), _LIMITS, _VOCABULARY, None)
        return arrival.next_frame(self._hidden, self._timing)

    def _native_frames(self) -> bytes:
        """The frame has the arrays."""
        arrival = Arrival.read(self._frame, self._reader, 0, 0)
        assert arrival.native is not None and self._tokens.fill_frame(arrival.native)
        return arrival.next_frame(self._hidden, self._timing)

    def _native_inputs(self) -> int:
        tasks = inputs_reader().read(self._inputs)
        assert tasks is not None
        return tasks.number

    def _results(self) -> bytes:
        rows = self._sampler.run(self._logits, self._tasks)
        sampled_tokens_of(1, rows)
        return encode_result(Result(1, 1, rows, (self._timing,)))

    def _native_results(self) -> bytes:
        outcomes, timing = self._sampler.sample(self._logits, self._native_tasks), self._timing
        SampledTokens(1, tuple(outcomes.tokens))
        return outcomes.result(self._native_frame, timing.queue_ns, timing.compute_ns, timing.wire_ns)

    def _read_tokens(self) -> tuple[int, tuple[int, ...]]:
        read = decode_sampled_tokens(self._sampled)
        return read.number, read.tokens

    def _native_read_tokens(self) -> tuple[int, tuple[int, ...]]:
        read = _native.read_sampled_tokens(self._sampled, MAX_BATCH_TOKENS, MAX_VOCABULARY)
        assert read is not None
        return read[0], tuple(read[1])


def microseconds(call: Callable[[], object], calls: int) -> float:
    begun_ns = perf_counter_ns()
    for _ in range(calls):
        call()
    return (perf_counter_ns() - begun_ns) / calls / 1e3


def measure(rows: Sequence[int], rounds: int, calls: int) -> None:
    print(f"{'':50} {'rows':>5} {'codec':>9} {'native':>9}")
    for count in rows:
        for part in Step(count).parts:
            assert part.codec() == part.native(), part.name
            pairs = [(microseconds(part.codec, calls), microseconds(part.native, calls)) for _ in range(rounds)]
            codec, native = (median(way) for way in zip(*pairs, strict=True))
            print(f"{part.name:50} {count:5} {codec:9.2f} {native:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=listed(positive), default="1,8", help="of a microbatch; %(default)s by default")
    parser.add_argument("--rounds", type=positive, default=9, help="%(default)s by default")
    parser.add_argument("--calls", type=positive, default=200, help="of a round; %(default)s by default")
    given = parser.parse_args()
    if max(given.rows) > _LIMITS.max_sequences:
        parser.error(f"--rows is at most {_LIMITS.max_sequences}")
    measure(given.rows, given.rounds, given.calls)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
