"""Speed beside llama.cpp: `llamaclust bench` and its `llama-bench` in turns, in one run, as ratios.

    python benchmarks/compare.py MODEL.gguf... --llama-bench PATH [--threads 2] [--depth 8000] [--json PATH]

A ratio above 1 means that llamaclust is faster. Medians of the ratios of pairs, then the least and the most: these
machines are noisy. With `--depth` decode alone is compared, behind so many tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from llamaclust.tools.bench_limits import Spread

_DEADLINE_S = 1800
_LEAST_PROMPT = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second; of ours also the shares of the machine's limits. Prefill is None where it is not compared."""

    prefill: float | None
    decode: float
    prefill_share: float | None = None
    decode_share: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Both programs, one right after the other."""

    ours: Speed
    theirs: Speed

    @property
    def prefill(self) -> float:
        assert self.ours.prefill is not None and self.theirs.prefill is not None
        return self.ours.prefill / self.theirs.prefill

    @property
    def decode(self) -> float:
        return self.ours.decode / self.theirs.decode


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured, by either program."""

    llama_bench: Path
    threads: int = 2
    prompt: int = 512
    generate: int = 128
    depth: int = 0
    runs: int = 2

    def pair(self, model: Path) -> Pair:
        return Pair(self._ours(model), self._theirs(model))

    def _ours(self, model: Path) -> Speed:
        program = [str(Path(sys.executable).parent / "llamaclust"), "bench", str(model), "--json"]
        answer = json.loads(_output([*program, *self._options(_LEAST_PROMPT if self.depth else self.prompt)]))
        prefill, decode = answer["prefill"]["tok_s"], answer["decode"]["tok_s"]
        shares = answer["prefill_roofline"], answer["decode_roofline"]
        return Speed(None, decode, None, shares[1]) if self.depth else Speed(prefill, decode, *shares)

    def _theirs(self, model: Path) -> Speed:
        program = [str(self.llama_bench), "-m", str(model), "-o", "json"]
        answers = json.loads(_output([*program, *self._options(0 if self.depth else self.prompt)]))
        prefill = next((answer["avg_ts"] for answer in answers if answer["n_gen"] == 0), None)
        return Speed(prefill, next(answer["avg_ts"] for answer in answers if answer["n_prompt"] == 0))

    def _options(self, prompt: int) -> list[str]:
        values = {"-t": self.threads, "-p": prompt, "-n": self.generate, "-d": self.depth, "-r": self.runs}
        return [str(word) for option in values.items() for word in option]


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return done.stdout


def as_line(model: str, task: Task, pair: Pair) -> str:
    what = {"threads": task.threads, "prompt": task.prompt, "generate": task.generate, "depth": task.depth}
    return json.dumps({"model": model, **what, "ours": asdict(pair.ours), "llama.cpp": asdict(pair.theirs)})


def show(model: str, pairs: Sequence[Pair]) -> None:
    for name in ("prefill", "decode"):
        if getattr(pairs[0].ours, name) is None:
            continue
        ours, theirs = (Spread.of(getattr(getattr(pair, who), name) for pair in pairs) for who in ("ours", "theirs"))
        share = Spread.of(getattr(pair.ours, f"{name}_share") for pair in pairs)
        ratio = Spread.of(getattr(pair, name) for pair in pairs)
        speeds = f"{ours.median:9.1f} tok/s, {share.median:4.0%} of the limit   llama.cpp {theirs.median:9.1f}"
        print(f"{model:12} {name:8} {speeds}   ratio {ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--llama-bench", type=Path, required=True, help="the program of that name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--depth", type=int, default=0, help="tokens in memory before decode begins")
    parser.add_argument("--runs", type=int, default=2, help="runs of each program in its turn")
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    parser.add_argument("--json", type=Path, help="add a JSON line a pair to this file")
    given = parser.parse_args()
    task = Task(given.llama_bench, given.threads, given.prompt, given.generate, given.depth, given.runs)
    with given.json.open("a") if given.json is not None else nullcontext() as file:
        for model in given.models:
            pairs = []
            for _ in range(given.repeats):
                pairs.append(task.pair(model))
                if file is not None:
                    print(as_line(model.stem, task, pairs[-1]), file=file, flush=True)
            show(model.stem, pairs)


if __name__ == "__main__":
    main()
