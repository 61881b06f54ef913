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
from dataclasses import dataclass, replace
from pathlib import Path

from llamaclust.model.loader import Model
from llamaclust.tools.bench.limits import Spread
from llamaclust.tools.bench.stage import BenchStage, stage_limits
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.whole_model import load_whole
from llamaclust.worker.settings import WorkerSettings

_SEQUENCES = 8
_STEPS = 32
_SHORT = 128
_PROMPT = 512
_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Scaling:
    """What is compared; each way returns its line. Decode behind a long context fills `context` tokens."""

    path: Path
    threads: int
    repeats: int
    context: int

    def batch(self) -> str:
        context = _STEPS + 1
        with self._stage(_SEQUENCES, context) as many, self._stage(1, context) as one:
            spread = self._ratios(lambda: _SEQUENCES / many.decode(0, _STEPS), lambda: 1 / one.decode(0, _STEPS))
        return f"decode of {_SEQUENCES} sequences together, tok/s beside one: {spread:.2f}   (>= 5 for 1.1B in Q4_K)"

    def depth(self) -> str:
        far = self.context - _STEPS - 1
        with self._stage(1, self.context) as one:
            one.prefill(far)
            spread = self._ratios(lambda: 1 / one.decode(far, _STEPS), lambda: 1 / one.decode(_SHORT, _STEPS))
        return f"decode behind {far} tokens, tok/s beside {_SHORT}: {spread:.3f}   (>= 0.72 for 1.1B in Q4_K, f16 keys)"

    def prefill(self) -> str:
        alone = replace(self, threads=1)
        with self._stage(1, _PROMPT + 1) as every, alone._stage(1, _PROMPT + 1) as one:
            spread = self._ratios(lambda: 1 / every.prefill(_PROMPT), lambda: 1 / one.prefill(_PROMPT))
        return f"prefill of {_PROMPT} tokens, {self.threads} threads beside one: {spread:.2f}   (>= 1.85 for two)"

    @contextmanager
    def _stage(self, batch: int, context: int) -> Iterator[BenchStage]:
        with Model.open(self.path) as model:
            device = Device.open(WorkerSettings(name="benchmark", threads=self.threads))
            opened = BenchStage(model, load_whole(device, model, stage_limits(batch, context)))
            try:
                yield opened
            finally:
                opened.close()

    def _ratios(self, a: Callable[[], float], b: Callable[[], float]) -> Spread:
        """Of what `a` tells to what `b` tells, after a turn of each that does not count."""
        pairs = [(a(), b()) for _ in range(self.repeats + 1)][1:]
        return Spread.of(one / other for one, other in pairs)


WAYS = {"batch": Scaling.batch, "depth": Scaling.depth, "threads": Scaling.prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default=",".join(WAYS), help="some of these, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    parser.add_argument("--context", type=int, help=f"tokens of the long context of `depth`, {_CONTEXT} unless given")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"--only knows {', '.join(WAYS)}, not {min(unknown)!r}")
    if given.context is not None and "depth" not in names:
        parser.error("--context is for depth, which --only leaves out")
    context = _CONTEXT if given.context is None else given.context
    if context < _SHORT + _STEPS + 1:
        parser.error(f"--context must be at least {_SHORT + _STEPS + 1}")
    scaling = Scaling(given.model, given.threads, given.repeats, context)
    for name in names:
        print(WAYS[name](scaling), flush=True)


if __name__ == "__main__":
    main()
