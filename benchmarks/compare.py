"""Speed beside llama.cpp: `llamaclust bench` and its `llama-bench` in turns, in one run, as ratios.

    python benchmarks/compare.py MODEL.gguf... --llama-bench PATH [--threads 2] [--depth 8000] [--json PATH]

A ratio above 1 means that llamaclust is faster. Medians of the ratios of pairs, then the least and the most: these
machines are noisy. With `--depth` decode alone is compared, behind so many tokens.

llama-bench is a program of llama.cpp, to be built on the machine that is measured:

    git clone --depth 1 https://github.com/ggml-org/llama.cpp && cd llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-bench -j    # build/bin/llama-bench
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from measuring.options import natural, positive

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError
from llamaclust.tools.bench.limits import Spread

_DEADLINE_S = 1800
_LEAST_PROMPT = 16
_Value = TypeVar("_Value")


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
        answer = _answer([*program, *self._options(_LEAST_PROMPT if self.depth else self.prompt)])
        prefill, decode = answer["prefill"]["tok_s"], answer["decode"]["tok_s"]
        shares = answer["prefill_roofline"], answer["decode_roofline"]
        return Speed(None, decode, None, shares[1]) if self.depth else Speed(prefill, decode, *shares)

    def _theirs(self, model: Path) -> Speed:
        options = self._options(0 if self.depth else self.prompt)
        return their_speed(self.llama_bench, their_answers(self.llama_bench, model, options))

    def _options(self, prompt: int) -> list[str]:
        values = {"-t": self.threads, "-p": prompt, "-n": self.generate, "-r": self.runs}
        if self.depth:  # ik_llama.cpp's program does not know it
            values["-d"] = self.depth
        return [str(word) for option in values.items() for word in option]


def their_answers(program: Path, model: Path, options: Sequence[str]) -> list[Any]:
    """What llama-bench prints, one object a test. UsageError where it cannot."""
    answers = _answer([str(program), "-m", str(model), "-o", "json", *options])
    return answers if isinstance(answers, list) else [answers]


def their_speed(program: Path, answers: Sequence[Any]) -> Speed:
    """The best of the tests of each kind. UsageError where llama-bench does not answer so."""
    try:
        prefills = [float(answer["avg_ts"]) for answer in answers if answer["n_gen"] == 0]
        decodes = [float(answer["avg_ts"]) for answer in answers if answer["n_prompt"] == 0]
        return Speed(max(prefills, default=None), max(decodes))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{program}: its JSON is not that of llama-bench; take a newer one") from None


def _answer(command: list[str]) -> Any:
    """The JSON that a program prints. UsageError where it cannot be run, fails, or prints something else."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except OSError as error:
        raise UsageError(f"{command[0]}: cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise UsageError(f"{command[0]}: not done after {_DEADLINE_S} s; measure less") from None
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise UsageError(f"{command[0]} failed: {last or f'it ended with {done.returncode} and no word'}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        start = " ".join(done.stdout.split())[:80]
        raise UsageError(f"{command[0]}: JSON expected, not {start!r}") from None


def check_program(path: Path, how: str = "`compare.py --help`") -> Path:
    """An absolute path. UsageError where no program is there; `how` says how it is built."""
    if path.is_dir():
        raise UsageError(f"--llama-bench {path}: a folder; give the program in it, such as {path}/bin/llama-bench")
    if not path.exists():
        raise UsageError(f"--llama-bench {path}: no such file; {how} says how to build it")
    if not os.access(path, os.X_OK):
        raise UsageError(f"--llama-bench {path}: not a program that can be run")
    return path.absolute()


def as_line(model: str, task: Task, pair: Pair) -> str:
    what = {"threads": task.threads, "prompt": task.prompt, "generate": task.generate, "depth": task.depth}
    return json.dumps({"model": model, **what, "ours": asdict(pair.ours), "llama.cpp": asdict(pair.theirs)})


def show(model: str, pairs: Sequence[Pair]) -> None:
    for name in ("prefill", "decode"):
        if getattr(pairs[0].ours, name) is None:
            continue
        ours, theirs = (
            Spread.of(getattr(getattr(pair, program), name) for pair in pairs) for program in ("ours", "theirs")
        )
        share = Spread.of(getattr(pair.ours, f"{name}_share") for pair in pairs)
        ratio = Spread.of(getattr(pair, name) for pair in pairs)
        speeds = f"{ours.median:9.1f} tok/s, {share.median:4.0%} of the limit   llama.cpp {theirs.median:9.1f}"
        print(f"{model:12} {name:8} {speeds}   ratio {ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--llama-bench", type=Path, required=True, help="the program of that name")
    parser.add_argument("--threads", type=positive, default=2, help="%(default)s by default")
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of a prefill; %(default)s by default")
    parser.add_argument("--generate", type=positive, default=128, help="tokens decoded; %(default)s by default")
    parser.add_argument("--depth", type=natural, default=0, help="tokens in memory before decode begins; 0 by default")
    parser.add_argument(
        "--runs", type=positive, default=2, help="runs of each program in its turn; %(default)s by default"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="pairs; %(default)s by default")
    parser.add_argument("--json", type=Path, help="add a JSON line a pair to this file")
    given = parser.parse_args()
    for model in given.models:
        if not model.is_file():
            raise UsageError(f"{model}: no such file")
    task = Task(check_program(given.llama_bench), given.threads, given.prompt, given.generate, given.depth, given.runs)
    with given.json.open("a") if given.json is not None else nullcontext() as file:
        for model in given.models:
            pairs = []
            for _ in range(given.repeats):
                pairs.append(task.pair(model))
                if file is not None:
                    print(as_line(model.stem, task, pairs[-1]), file=file, flush=True)
            show(model.stem, pairs)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
