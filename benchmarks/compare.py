"""Speed beside llama.cpp: `llamaclust bench` and its `llama-bench` in turns, in one run, as ratios.

    python benchmarks/compare.py MODEL.gguf --llama-bench PATH [--threads 2] [--repeats 5] [--json PATH]

A ratio above 1 means that llamaclust is faster. Medians of the ratios of pairs: these machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

_DEADLINE_S = 900


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, by either program."""

    model: Path
    threads: int
    prompt: int
    generate: int

    @property
    def options(self) -> list[str]:
        return ["-t", str(self.threads), "-p", str(self.prompt), "-n", str(self.generate), "-r", "2"]

    def ours(self) -> Speed:
        program = [str(Path(sys.executable).parent / "llamaclust"), "bench", str(self.model)]
        answer = json.loads(_output([*program, *self.options, "--json"]))
        return Speed(answer["prefill"]["tok_s"], answer["decode"]["tok_s"])

    def theirs(self, llama_bench: Path) -> Speed:
        answers = json.loads(_output([str(llama_bench), "-m", str(self.model), *self.options, "-o", "json"]))
        prefill = next(answer for answer in answers if answer["n_gen"] == 0)
        decode = next(answer for answer in answers if answer["n_prompt"] == 0)
        return Speed(prefill["avg_ts"], decode["avg_ts"])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True, help="the program of that name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    parser.add_argument("--json", type=Path, help="write a JSON line a pair to this file")
    arguments = parser.parse_args()
    run = Run(arguments.model, arguments.threads, arguments.prompt, arguments.generate)
    pairs = []
    for _ in range(arguments.repeats):
        pairs.append((run.ours(), run.theirs(arguments.llama_bench)))
        ours, theirs = pairs[-1]
        for name in ("prefill", "decode"):
            a, b = getattr(ours, name), getattr(theirs, name)
            print(f"{name:8} {a:9.1f} tok/s   llama.cpp {b:9.1f} tok/s   ratio {a / b:.2f}", flush=True)
    if arguments.json is not None:
        lines = [json.dumps({"ours": asdict(ours), "llama.cpp": asdict(theirs)}) for ours, theirs in pairs]
        arguments.json.write_text("\n".join(lines) + "\n")
    for name in ("prefill", "decode"):
        ratios = [getattr(ours, name) / getattr(theirs, name) for ours, theirs in pairs]
        print(f"{name}: median ratio {median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")


if __name__ == "__main__":
    main()
