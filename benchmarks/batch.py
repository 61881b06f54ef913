"""How decode and prefill scale, in one process, each way in turns with another, as ratios of pairs:

- decode of 8 sequences together, tokens a second beside one alone;
- decode of one behind a long context beside one behind 128 tokens;
- prefill on two threads beside one.

    python benchmarks/batch.py 1.1b.gguf [--only batch,depth,threads] [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.tools.bench_limits import Spread
from llamaclust.tools.bench_stage import BenchStage

_SEQUENCES = 8
_STEPS = 32
_SHORT = 128
_PROMPT = 512


@contextmanager
def stage(path: Path, threads: int, batch: int, context: int) -> Iterator[BenchStage]:
    with Model.open(path) as model:
        opened = BenchStage(model, CpuBackend(threads), batch, context)
        try:
            yield opened
        finally:
            opened.close()


def ratios(repeats: int, a: Callable[[], float], b: Callable[[], float]) -> Spread:
    """Of what `a` tells to what `b` tells, after a turn of each that does not count."""
    pairs = [(a(), b()) for _ in range(repeats + 1)][1:]
    return Spread.of(one / other for one, other in pairs)


def batch(path: Path, threads: int, repeats: int, _: int) -> str:
    context = _STEPS + 1
    with stage(path, threads, _SEQUENCES, context) as many, stage(path, threads, 1, context) as one:
        spread = ratios(repeats, lambda: _SEQUENCES / many.decode(0, _STEPS), lambda: 1 / one.decode(0, _STEPS))
    return f"decode of {_SEQUENCES} sequences together, tok/s beside one: {spread:.2f}   (>= 5 for 1.1B in Q4_K)"


def depth(path: Path, threads: int, repeats: int, context: int) -> str:
    far = context - _STEPS - 1
    with stage(path, threads, 1, context) as one:
        one.prefill(far)
        spread = ratios(repeats, lambda: 1 / one.decode(far, _STEPS), lambda: 1 / one.decode(_SHORT, _STEPS))
    return f"decode behind {far} tokens, tok/s beside {_SHORT}: {spread:.3f}   (>= 0.72 for 1.1B in Q4_K, f16 keys)"


def threads(path: Path, threads: int, repeats: int, _: int) -> str:
    with stage(path, threads, 1, _PROMPT + 1) as all_threads, stage(path, 1, 1, _PROMPT + 1) as one:
        spread = ratios(repeats, lambda: 1 / all_threads.prefill(_PROMPT), lambda: 1 / one.prefill(_PROMPT))
    return f"prefill of {_PROMPT} tokens, {threads} threads beside one: {spread:.2f}   (>= 1.85 for two)"


WAYS = {"batch": batch, "depth": depth, "threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default=",".join(WAYS), help="some of these, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    parser.add_argument("--context", type=int, default=8192, help="tokens of the long context")
    given = parser.parse_args()
    for name in given.only.split(","):
        print(WAYS[name](given.model, given.threads, given.repeats, given.context), flush=True)


if __name__ == "__main__":
    main()
