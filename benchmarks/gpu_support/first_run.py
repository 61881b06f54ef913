"""The first run on a new GPU, step by step: tests of every kernel, and then benchmarks. Several calls can share the
work, if the machine is available for only some minutes at a time.

    python benchmarks/gpu_support/first_run.py gpu-results            # repeat while the output says: steps left
    python benchmarks/gpu_support/first_run.py gpu-results --minutes 8 --models /dev/shm --out FOLDER
    python benchmarks/gpu_support/first_run.py --list                 # the steps, in their order

A step begins if its expected time is left, and ends at its maximum or at the end of --minutes. Each run of a step has a
number: its output is in RESULTS/NNN-NAME.log, and records of benchmarks are in RESULTS/NNN-NAME. RESULTS/NAME.jsonl has
a line for each test. RESULTS/steps.json has the last outcomes. After each step, all results are packed into --out. To
continue on another machine, unpack them there as RESULTS.

Steps that failed come first once sources have changed, and begin with the tests that failed. Steps that passed are
repeated last if sources have changed, else not at all. The exit status is 0 if all passed, 1 if any failed, and 75 if
any is left. Models of random weights (4, 12, 4 and 39 GB) go to --models."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from runner.llama import check_program

from gpu_support.folders import only_run, ready_folder
from gpu_support.outcomes import Outcome, Record
from gpu_support.processes import GRACE_S, OUT_OF_TIME, run_script
from gpu_support.sources import ROOT, sources_digest
from gpu_support.steps import DIFFERENT, LLAMA_STEPS, STEPS, Step
from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError

_LEFT = 75  # EX_TEMPFAIL
_FAILURES = 12
"""The maximum number of failed tests that are printed after a step."""


def run_steps(
    steps: Sequence[Step], record: Record, places: dict[str, str], budget_s: float, now_s: Callable[[], float]
) -> int:
    """Runs the steps that are due, each while time is left. Returns the exit status."""
    begun_s, left = now_s(), 0
    for step in _due(steps, record):
        left_s = budget_s - (now_s() - begun_s) - GRACE_S
        if step.expected_s > left_s:
            left += 1
            _say(f"{step.name}: left for the next call ({step.expected_s} s)")
            continue
        outcome = _run(step, record, places, min(step.maximum_s, left_s), now_s)
        left += outcome.status == OUT_OF_TIME and left_s < step.maximum_s
        if step.is_vital and outcome.status not in (0, DIFFERENT):
            _say(f"no other step can pass without {step.name}: see {record.folder / outcome.log}")
            return 1
    run = [(step.name, found.passed) for step in steps if (found := record.outcome(step)) is not None]
    failed = [name for name, passed in run if not passed]
    _say(f"{len(run) - len(failed)} of {len(steps)} passed; failed: {failed or 'none'}")
    return _LEFT if left else int(bool(failed))


def _due(steps: Sequence[Step], record: Record) -> list[Step]:
    """Returns vital steps, then steps that failed with other sources, then new steps, then others that failed, then
    steps that passed with other sources."""

    def turn(step: Step) -> int:
        outcome = record.outcome(step)
        if step.is_vital or outcome is None:
            return 0 if step.is_vital else 2
        is_changed = outcome.sources != record.sources
        return 4 if outcome.passed else 1 if is_changed else 3

    def is_due(step: Step) -> bool:
        outcome = record.outcome(step)
        return step.is_vital or outcome is None or not outcome.passed or outcome.sources != record.sources

    return sorted(filter(is_due, steps), key=turn)


def _run(step: Step, record: Record, places: dict[str, str], limit_s: float, now_s: Callable[[], float]) -> Outcome:
    run, begun_s = record.next_run(step), now_s()
    log = run.with_name(f"{run.name}.log")
    model = Path(places["models"]) / step.model
    commands = [step.needs] if step.model and not model.is_file() else []
    script = " && ".join(_filled(one, places | {"run": str(run)}) for one in (*commands, step.command))
    _say(f"{step.name}: at most {limit_s:.0f} s: {script}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    status = run_script(script, ROOT, log, limit_s, {"PATH": path, "PYTHONUNBUFFERED": "1"})
    outcome = record.add(step, log, status, now_s() - begun_s)
    said = "passed" if outcome.passed else f"FAILED ({status}): {outcome.tail[-1] if outcome.tail else 'no output'}"
    _say(f"{step.name}: {outcome.seconds:.0f} s, {said}")
    lines = log.read_text(errors="replace").splitlines()
    failures = [line[line.index("failed: ") :] for line in lines if "failed: tests/" in line]
    for line in failures[:_FAILURES]:
        _say(f"  {line}")
    return outcome


def _filled(command: str, places: dict[str, str]) -> str:
    return command.format(**{name: shlex.quote(place) for name, place in places.items()})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return minutes


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS", nargs="?", default=Path("gpu-results"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for packed results")
    parser.add_argument(
        "--list", action="store_true", help="print the steps in their order, with expected and maximum seconds"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=9.5, help="maximum minutes of this call (default: %(default)s)"
    )
    parser.add_argument("--models", type=Path, default=Path("/dev/shm"), help="folder of models (default: %(default)s)")
    parser.add_argument("--llama-bench", type=Path, metavar="PROGRAM", help="llama-bench of llama.cpp, built for CUDA")
    given = parser.parse_args(arguments)
    if given.list:
        for step in (*STEPS, *LLAMA_STEPS):
            print(f"{step.name:17} {step.expected_s:4} to {step.maximum_s:3} s  {step.command}")
        return 0
    if not given.models.is_dir():
        raise UsageError(f"{given.models}: no such folder")
    llama = check_program(given.llama_bench, "docs/internals/gpu-kernels.md") if given.llama_bench is not None else None
    for folder in (given.results, *([given.out] if given.out is not None else [])):
        ready_folder(folder)
    steps = (*STEPS, *(LLAMA_STEPS if llama is not None else ()))
    sources = sources_digest(ROOT)
    places = {
        "models": str(given.models.resolve()),
        "results": str(given.results.resolve()),
        "llama": str(llama),
        "sources": sources,
    }
    with only_run(given.results):
        record = Record(given.results.resolve(), sources, given.out)
        try:
            return run_steps(steps, record, places, 60 * given.minutes, time.monotonic)
        finally:
            record.pack()  # Includes the output of a step that a signal has ended.


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main(sys.argv[1:]))
