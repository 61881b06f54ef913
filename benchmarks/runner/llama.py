"""Runs llama.cpp's program llama-bench, and other programs that print JSON.

llama-bench must be built on the machine that is measured:

    git clone --depth 1 https://github.com/ggml-org/llama.cpp && cd llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-bench llama-server -j"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaclust.core.errors import UsageError

_DEADLINE_S = 1800


@dataclass(frozen=True, slots=True)
class Speed:
    prefill: float | None
    decode: float
    prefill_share: float | None = None
    decode_share: float | None = None


def check_program(
    path: Path, how: str = "the docstring of benchmarks/runner/llama.py", option: str = "--llama-bench"
) -> Path:
    """Returns a program's absolute path, or raises UsageError. `how` is the place that says how to build the
    program."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the program in it, such as {path}/bin/{option[2:]}")
    if not path.exists():
        raise UsageError(f"{option} {path}: no such file; {how} says how to build it")
    if not os.access(path, os.X_OK):
        raise UsageError(f"{option} {path} is not a program that can be run; check its permissions")
    return path.absolute()


def their_answers(program: Path, model: Path, options: Sequence[str]) -> list[Any]:
    """Returns llama-bench's output, which has one object for each test. Raises UsageError if llama-bench fails."""
    answers = json_of([str(program), "-m", str(model), "-o", "json", *options])
    return answers if isinstance(answers, list) else [answers]


def their_speed(program: Path, answers: Sequence[Any]) -> Speed:
    try:
        prefills = [float(answer["avg_ts"]) for answer in answers if answer["n_gen"] == 0]
        decodes = [float(answer["avg_ts"]) for answer in answers if answer["n_prompt"] == 0]
        return Speed(max(prefills, default=None), max(decodes))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{program} does not print llama-bench's JSON; use a newer llama-bench") from None


def json_of(command: Sequence[str]) -> Any:
    """Returns the JSON that a program prints. Raises UsageError if the program fails or prints other text."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise UsageError(f"{command[0]} has not finished after {_DEADLINE_S} s; measure fewer tokens") from None
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise UsageError(f"{command[0]} failed: {last or f'exit status {done.returncode}, no output'}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        start = " ".join(done.stdout.split())[:80]
        raise UsageError(f"{command[0]} printed {start!r} instead of JSON") from None
