"""Times a step beside its computing: messages of one decode step, written by the coordinator and read by a stage.

    python benchmarks/native_step.py [--rows 1,8] [--rounds 9] [--calls 200]

Microseconds of a call in a loop, where the caches hold all of it: medians of rounds, all kinds in turns. A microbatch
follows another one whose tokens are filled in, in a model 576 wide; rows are sampled from 32 words. Beside plain rows
are those with states, with adapters, with drafts of a head and with matchers, whose own work is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np
from measuring.options import listed, positive

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS, StageLimits
from llamaclust.core.sampling import MatcherRow, SampleTask, SamplingParams
from llamaclust.core.sampling_bounds import MAX_VOCABULARY
from llamaclust.kernels import _native
from llamaclust.kernels.sampling import Sampler
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES, encode_microbatch, encode_sampled_tokens
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SampledTokens, SamplingInputs
from llamaclust.wire.microbatch.results import decode_result
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox
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
    """Microbatch 1, of `rows` sequences that follow microbatch 0."""

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
            "microbatch written": lambda: encode_hidden(encode_microbatch(self._microbatch)),
            "frame read, tokens filled in, next frame": self.frames,
            "arrays of the frame": lambda: batch_of(self._read),
            "sampling inputs written": lambda: encode_inputs(self._inputs),
            "sampling inputs read": lambda: StepInputs.read(self._tasks).for_matchers,
            "32 words sampled, result written": self.result,
            "result read": lambda: decode_result(self._result),
            "sampled tokens read": lambda: _native.read_sampled_tokens(self._sampled, MAX_BATCH_TOKENS, MAX_VOCABULARY),
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


def microseconds(call: Callable[[], object], calls: int) -> float:
    begun_ns = perf_counter_ns()
    for _ in range(calls):
        call()
    return (perf_counter_ns() - begun_ns) / calls / 1e3


def measure(rows: Sequence[int], rounds: int, calls: int) -> None:
    print(f"{'':42} {'rows':>5}" + "".join(f" {kind:>9}" for kind in KINDS))
    for count in rows:
        steps = [Step(count, kind).parts for kind in KINDS]
        sums = np.zeros(len(steps))
        for name in steps[0]:
            taken = [[microseconds(step[name], calls) for step in steps] for _ in range(rounds)]
            found = [median(kind) for kind in zip(*taken, strict=True)]
            sums += found
            print(f"{name:42} {count:5}" + "".join(f" {each:9.2f}" for each in found), flush=True)
        print(f"{'all':42} {count:5}" + "".join(f" {each:9.2f}" for each in sums), flush=True)


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
