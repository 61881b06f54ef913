"""The first run on a new GPU, step by step: tests of every kernel, and then benchmarks. Several calls can share the
work, if the machine is available for only some minutes at a time.

    python benchmarks/gpu_support/first_run.py results                      # repeat while the output says: steps left
    python benchmarks/gpu_support/first_run.py results --minutes 9 --models /dev/shm
    python benchmarks/gpu_support/first_run.py --list                       # the steps, in their order

Each step is a command with a time limit. Its output is in results/NAME.log, records of benchmarks are in results/NAME,
and results/steps.json has the outcomes. A step that passed with the present sources is not repeated. A step that failed
is repeated after all new steps. A step begins only if its time limit ends within --minutes. The exit status
is 0 if all passed, 1 if any failed, and 75 if any is left. Models of random weights (4, 12, 4 and 39 GB) go to
--models."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

sys.path.append(str(Path(__file__).parent.parent))

from runner.llama import check_program

from gpu_support.folders import only_run, ready_folder
from gpu_support.sources import ROOT, sources_digest
from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError

_TESTS = "tests/kernels/cuda"
_BENCHMARKS = "benchmarks/test_gpu_benchmark.py", "benchmarks/test_gpu_mixtures.py"
_PROCESSES = 8
"""The number of test processes. Each takes some hundred MiB of GPU memory and mostly waits for results of the CPU."""
_LEFT = 75  # EX_TEMPFAIL
_TAIL_LINES = 5
_GRACE_S, _POLL_S = 5.0, 0.05


@dataclass(frozen=True, slots=True)
class Step:
    """A step. `command` may contain {models}, {results} and {llama}. The command `needs` writes the step's model."""

    name: str
    limit_s: int
    command: str
    needs: str = ""
    model: str = ""  # Name of the step's model in the folder of models.
    is_vital: bool = False  # True if no other step can pass without this step.


def _tests(name: str, *files: str, limit_s: int = 300, options: str = "") -> Step:
    paths = " ".join(f"{_TESTS}/{file}" for file in files)
    return Step(name, limit_s, f"python -m pytest {paths} --gpu -n {_PROCESSES} --dist worksteal {options}".rstrip())


def _benchmark(name: str, limit_s: int, model: str, writer: str, options: str = "") -> Step:
    command = f"python benchmarks/gpu.py {{models}}/{model} --record {{results}}/{name} {options}".rstrip()
    return Step(name, limit_s, command, f"python benchmarks/{writer}", model)


_7B = "7b.gguf", "shape.py 7b Q4_K {models}/7b.gguf --alike"
_MIXTURE = "mixture.gguf", "public_shape.py qwen3-30b-a3b:q4_k_m {models}/mixture.gguf --layers 32"
_LONG = "long.gguf", "shape.py 7b Q4_K {models}/long.gguf --alike --kv-heads 8 --context 40000"
_70B = "70b.gguf", "shape.py 70b Q4_K {models}/70b.gguf --alike"

STEPS = (
    Step("gpu", 60, "nvidia-smi", is_vital=True),
    replace(_tests("call", "test_rows.py", options="-k rms_norm"), is_vital=True),
    _tests("products", "test_products.py"),
    _tests("rows", "test_rows.py"),
    _tests("attention", "test_attention.py", "test_latent.py"),
    _tests("experts", "test_experts.py", "test_states.py", "test_fused.py"),
    _tests("stages", "test_stage.py", "test_stage_load.py", "stages", limit_s=480),
    _tests("placement", "placement", "test_invariance_stages.py", "test_probe.py", "test_local.py", limit_s=480),
    _tests("clusters", "test_cluster.py", *_BENCHMARKS, limit_s=480),
    _benchmark("7b", 240, *_7B),
    Step("sanitizer", 240, f"compute-sanitizer python -m pytest {_TESTS}/test_products.py --gpu -k 'Q4_K or Q8_0'"),
    Step("races", 240, f"compute-sanitizer --tool racecheck python -m pytest {_TESTS}/test_products.py --gpu -k Q4_K"),
    _benchmark("mixture", 300, *_MIXTURE),
    _benchmark("mixture-ram", 300, *_MIXTURE, "--cpu-moe --experts-cache 0 --repeats 3"),
    _benchmark("mixture-copies", 300, *_MIXTURE, "--cpu-moe --experts-cache 6GiB --repeats 3"),
    _benchmark("mixture-products", 240, *_MIXTURE, "--no-graphs --repeats 1 --generate 16 --prompt 2048"),
    _benchmark("long", 300, *_LONG, "--prompt 32768 --sequences 1 --repeats 1"),
    _benchmark("7b-no-graphs", 240, *_7B, "--no-graphs --repeats 2"),
    _benchmark("70b", 500, *_70B, "--gpu-memory 24GiB --repeats 3"),
)
LLAMA_STEPS = (_benchmark("7b-llama", 400, *_7B, "--llama-bench {llama} --repeats 3"),)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a step. Exit status 124 means that the time limit was reached."""

    status: int
    seconds: float
    sources: str
    tail: tuple[str, ...]  # Last lines of the output.

    @property
    def passed(self) -> bool:
        return self.status == 0


class Record:
    def __init__(self, folder: Path, sources: str) -> None:
        self.folder, self._sources, self._path = folder, sources, folder / "steps.json"
        self._partial = self._path.with_suffix(".tmp")
        for path in (self._path, self._partial):
            if path.exists() and not path.is_file():
                raise UsageError(f"{path}: not a regular file; remove it")
        try:
            self._outcomes = _outcomes(self._path.read_bytes()) if self._path.exists() else {}
        except (ValueError, RecursionError):  # RecursionError is raised for thousands of nested brackets.
            raise UsageError(f"{self._path} has no outcomes of steps; remove it to run all steps again") from None

    def outcome(self, step: Step) -> Outcome | None:
        found = self._outcomes.get(step.name)
        return found if found is not None and found.sources == self._sources else None

    def add(self, step: Step, status: int, seconds: float) -> Outcome:
        lines = (self.folder / f"{step.name}.log").read_text(errors="replace").splitlines()
        outcome = Outcome(status, round(seconds, 1), self._sources, tuple(lines[-_TAIL_LINES:]))
        self._outcomes[step.name] = outcome
        text = json.dumps({name: asdict(one) for name, one in self._outcomes.items()}, indent=2) + "\n"
        self._partial.write_text(text)
        self._partial.replace(self._path)
        return outcome


def _outcomes(data: bytes) -> dict[str, Outcome]:
    found = json.loads(data)
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise ValueError("no objects by names")
    # A record with other keys comes from another version of this program.
    known = {field.name for field in fields(Outcome)}
    return {name: _outcome(**values) for name, values in found.items() if values.keys() == known}


def _outcome(status: object, seconds: object, sources: object, tail: object) -> Outcome:
    if (
        type(status) is not int or type(seconds) not in (int, float) or not isinstance(sources, str)
    ):  # A bool is refused too.
        raise ValueError("of other types")
    if not isinstance(tail, list) or not all(isinstance(line, str) for line in tail):
        raise ValueError("no lines")
    return Outcome(status, cast(float, seconds), sources, tuple(tail))


def run_steps(
    steps: Sequence[Step], record: Record, places: dict[str, str], budget_s: float, now_s: Callable[[], float]
) -> int:
    """Runs vital steps first, then new steps, then steps that failed before. Returns the exit status."""
    begun_s = now_s()
    outcomes = {step: record.outcome(step) for step in steps}
    due = [step for step, outcome in outcomes.items() if outcome is None or not outcome.passed]
    left = 0
    for step in sorted(due, key=lambda step: 0 if step.is_vital else 1 if outcomes[step] is None else 2):
        if now_s() - begun_s + step.limit_s > budget_s:
            left += 1
            _say(f"{step.name}: left for the next call ({step.limit_s} s)")
            continue
        _say(f"{step.name}: {_filled(step.command, places)}")
        step_s = now_s()
        status = _run(step, record.folder / f"{step.name}.log", places)
        outcome = record.add(step, status, now_s() - step_s)
        said = "passed" if outcome.passed else f"FAILED ({status}): {outcome.tail[-1] if outcome.tail else 'no output'}"
        _say(f"{step.name}: {outcome.seconds:.0f} s, {said}")
        if step.is_vital and not outcome.passed:
            _say(f"no other step can pass without {step.name}: see {record.folder / step.name}.log")
            return 1
    run = [(step.name, found.passed) for step in steps if (found := record.outcome(step)) is not None]
    failed = [name for name, passed in run if not passed]
    _say(f"{len(run) - len(failed)} of {len(steps)} passed; failed: {failed or 'none'}")
    return _LEFT if left else int(bool(failed))


def _run(step: Step, log: Path, places: dict[str, str]) -> int:
    model = Path(places["models"]) / step.model
    commands = [step.needs] if step.model and not model.is_file() else []
    script = " && ".join(_filled(command, places) for command in (*commands, step.command))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with log.open("w") as file:
        _signals(signal.SIG_BLOCK)  # A signal during Popen would leave a process that nobody ends.
        try:
            process = subprocess.Popen(
                ["bash", "-c", script],
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: _signals(signal.SIG_UNBLOCK),
            )
            try:
                _signals(signal.SIG_UNBLOCK)
                return process.wait(step.limit_s)
            except subprocess.TimeoutExpired:
                return 124
            finally:
                if process.poll() is None:
                    _end(process)
        finally:
            _signals(signal.SIG_UNBLOCK)


def _signals(how: int) -> None:
    signal.pthread_sigmask(how, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of a step with SIGTERM and, after some seconds or at another Ctrl-C, with SIGKILL."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        end_s = time.monotonic() + _GRACE_S
        while _is_running(process.pid) and time.monotonic() < end_s:
            time.sleep(_POLL_S)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # The first process is not reaped yet, so no other process has this id.
        process.wait()


def _is_running(group: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # The process has ended meanwhile.
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


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
    parser.add_argument("--list", action="store_true", help="print the steps in their order, with their time limits")
    parser.add_argument(
        "--minutes", type=_minutes, default=9.5, help="maximum minutes of this call (default: %(default)s)"
    )
    parser.add_argument("--models", type=Path, default=Path("/dev/shm"), help="folder of models (default: %(default)s)")
    parser.add_argument("--llama-bench", type=Path, metavar="PROGRAM", help="llama-bench of llama.cpp, built for CUDA")
    given = parser.parse_args(arguments)
    if given.list:
        for step in (*STEPS, *LLAMA_STEPS):
            print(f"{step.name:17} {step.limit_s:4} s  {step.command}")
        return 0
    if not given.models.is_dir():
        raise UsageError(f"{given.models}: no such folder")
    llama = check_program(given.llama_bench, "docs/internals/gpu-kernels.md") if given.llama_bench is not None else None
    ready_folder(given.results)
    steps = (*STEPS, *(LLAMA_STEPS if llama is not None else ()))
    places = {
        "models": str(given.models.resolve()),
        "results": str(given.results.resolve()),
        "llama": str(llama),
    }
    with only_run(given.results):
        record = Record(given.results, sources_digest(ROOT))
        return run_steps(steps, record, places, 60 * given.minutes, time.monotonic)


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main(sys.argv[1:]))
