"""Tests of benchmarks/gpu_support/first_run.py: the order of steps, their ends, and the results that they leave."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.kernels.cuda.runtime.device import Device
from support.clusters.command_line import eventually
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from gpu_support import first_run, one_kernel, processes
from gpu_support.first_run import run_steps
from gpu_support.folders import only_run
from gpu_support.outcomes import Outcome, Record
from gpu_support.sources import sources_digest
from gpu_support.steps import DIFFERENT, LLAMA_STEPS, STEPS, Step


def counted(name: str, folder: Path, then: str = "true", expected_s: int = 1, maximum_s: int = 20) -> Step:
    return Step(name, expected_s, maximum_s, f"echo {name} >> {folder}/ran; {then}")


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split()


def places(folder: Path) -> dict[str, str]:
    return {"models": str(folder), "results": str(folder), "llama": "llama-bench"}


def run(folder: Path, *steps: Step, budget_s: float = 1000.0, sources: str = "c1", out: Path | None = None) -> int:
    return run_steps(steps, Record(folder, sources, out), places(folder), budget_s, time.monotonic)


def test_failed_steps_come_first_and_passed_ones_last_if_sources_changed(tmp_path: Path) -> None:
    bad = counted("bad", tmp_path, "echo what it said; exit 3")
    good, later, vital = (counted(name, tmp_path) for name in ("good", "later", "vital"))
    vital = replace(vital, is_vital=True)
    assert run(tmp_path, good, bad) == 1
    found = json.loads((tmp_path / "steps.json").read_text())["bad"]
    assert (found["status"], found["sources"], found["tail"]) == (3, "c1", ["what it said"])
    assert run(tmp_path, good, later, bad, vital, sources="c2") == 1
    assert ran(tmp_path) == ["good", "bad", "vital", "bad", "later", "good"]
    assert run(tmp_path, good, later, counted("bad", tmp_path), vital, sources="c2") == 0
    assert ran(tmp_path)[6:] == ["vital", "bad"], "what passed is not repeated, except vital steps"
    assert run(tmp_path, bad, good, later, sources="c2") == 0 and len(ran(tmp_path)) == 8


def test_no_output_is_overwritten(tmp_path: Path) -> None:
    step = counted("one", tmp_path, "mkdir {run}; exit 1")
    assert [run(tmp_path, step) for _ in range(2)] == [1, 1]
    names = ["001-one", "001-one.log", "002-one", "002-one.log"]
    assert sorted(path.name for path in tmp_path.glob("0*")) == names
    outcome = Record(tmp_path, "c1").outcome(step)
    assert outcome is not None and outcome.log == "002-one.log"


def test_results_are_packed_after_each_step(tmp_path: Path) -> None:
    folder, out = tmp_path / "results", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    unpack = f"tar xf {out}/results.tar.gz -C {tmp_path} && cat {tmp_path}/results/001-one.log"
    steps = counted("one", tmp_path, "echo number 1"), counted("two", tmp_path, unpack)
    with only_run(folder):
        assert run(folder, *steps, out=out) == 0
    found = json.loads((out / "steps.json").read_text())
    assert list(found) == ["one", "two"] and found["two"]["tail"] == ["number 1"]
    assert sorted(path.name for path in out.iterdir()) == ["results.tar.gz", "steps.json"]
    names = ["results", *(f"results/{name}" for name in ("001-one.log", "002-two.log", "steps.json"))]
    with tarfile.open(out / "results.tar.gz") as packed:
        assert sorted(packed.getnames()) == names
    Record(folder, "c1", folder).pack()
    Record(folder, "c1", folder).pack()
    with tarfile.open(folder / "results.tar.gz") as packed:
        assert "results/results.tar.gz" not in packed.getnames(), "results would contain themselves"


def test_failed_tests_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f".Ffailed: tests/test_a.py::test[{n}] (call) differ\\n" for n in range(20))
    assert run(tmp_path, counted("tests", tmp_path, f"printf '{lines}'; exit 1")) == 1
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  failed")]
    assert len(printed) == 12 and printed[0] == "  failed: tests/test_a.py::test[0] (call) differ"


def test_a_step_begins_if_its_expected_time_is_left_and_ends_with_the_call(tmp_path: Path) -> None:
    long, short = counted("long", tmp_path, expected_s=500), counted("short", tmp_path)
    assert run(tmp_path, long, short, budget_s=300) == 75
    assert ran(tmp_path) == ["short"]
    hanging = counted("hanging", tmp_path, "sleep 60", expected_s=1, maximum_s=600)
    assert run(tmp_path, hanging, budget_s=processes.GRACE_S + 1.2) == 75
    outcome = Record(tmp_path, "c1").outcome(hanging)
    assert outcome is not None and outcome.status == 124 and outcome.seconds < 20


def test_a_step_ends_at_its_limit_with_all_of_its_processes(tmp_path: Path) -> None:
    hanging = counted("hanging", tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait", maximum_s=1)
    assert run(tmp_path, hanging) == 1
    outcome = Record(tmp_path, "c1").outcome(hanging)
    assert outcome is not None and outcome.status == 124
    await_end(tmp_path / "child")


def has_ended(process: Path) -> bool:
    try:
        return "Z" in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def await_end(file: Path) -> None:
    """Waits for the end of the process whose id is in the file."""
    process = Path("/proc") / file.read_text().strip()
    eventually(lambda: has_ended(process), 60.0, "the end of the process")


def partial(folder: Path, then: str = "exit 1") -> str:
    """Returns a command that does not end by itself, and removes its file at SIGTERM."""
    loop = "while :; do sleep 0.05; done"
    return f"bash -c 'trap \"rm {folder}/part; {then}\" TERM; touch {folder}/part; {loop}' && true"


def test_what_is_ended_removes_its_partial_files(tmp_path: Path) -> None:
    assert run(tmp_path, Step("writer", 1, 1, partial(tmp_path))) == 1
    outcome = Record(tmp_path, "c1").outcome(Step("writer", 1, 1, ""))
    assert outcome is not None and outcome.status == 124 and outcome.seconds < processes.GRACE_S
    assert not (tmp_path / "part").exists() and (tmp_path / "001-writer.log").exists()


def test_what_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    step = Step("deaf", 1, 1, f"trap '' TERM; echo $$ > {tmp_path}/deaf; while :; do sleep 0.05; done")
    assert run(tmp_path, step) == 1
    assert not (Path("/proc") / (tmp_path / "deaf").read_text().strip()).exists()


def test_processes_that_a_step_leaves_are_killed(tmp_path: Path) -> None:
    assert run(tmp_path, counted("one", tmp_path, f"sleep 60 & echo $! > {tmp_path}/child")) == 0
    await_end(tmp_path / "child")


def calling(folder: Path, command: str) -> subprocess.Popen[str]:
    """Starts a call with a single step."""
    given = [str(folder), "--models", str(folder), "--out", str(folder / "out")]
    lines = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)",  # the tests may have started with it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r})",
        "from gpu_support import first_run",
        f"first_run.STEPS = (first_run.Step('writer', 1, 60, {command!r}),)",
        f"with first_run.ends_in_one_line(): first_run.main({given!r})",
    )
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stderr=subprocess.PIPE, text=True)


def test_a_step_ends_if_its_call_is_killed(tmp_path: Path) -> None:
    process = calling(tmp_path, f"sleep 60 & echo $! > {tmp_path}/.child; mv {tmp_path}/.child {tmp_path}/child; wait")
    try:
        eventually((tmp_path / "child").exists, 60.0, "the child")
    finally:
        process.kill()
        process.communicate()
    await_end(tmp_path / "child")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_step_as_its_limit_does(tmp_path: Path, number: signal.Signals) -> None:
    process = calling(tmp_path, partial(tmp_path))
    try:
        eventually((tmp_path / "part").exists, 60.0, "the partial file")
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number and "Traceback" not in err
    assert not (tmp_path / "part").exists()
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as packed:
        assert {f"{tmp_path.name}/{name}" for name in ("001-writer.log", "out")} <= {*packed.getnames()}


def test_models_are_written_when_they_are_missing(tmp_path: Path) -> None:
    step = Step("model", 1, 20, "cat {models}/m >> {results}/ran", "echo written > {models}/m", "m")
    assert run(tmp_path, step) == 0 and run(tmp_path, replace(step, name="again")) == 0
    (tmp_path / "m").write_text("kept")
    assert run(tmp_path, replace(step, name="third")) == 0
    assert ran(tmp_path) == ["written", "written", "kept"]


FIRST = ["gpu", "modules", "kernels", "stages", "7b", "sanitizer"]


def test_a_visit_begins_with_the_most_useful_steps() -> None:
    assert [step.name for step in STEPS[: len(FIRST)]] == FIRST and STEPS[-1].name == "races"
    assert sum(step.expected_s for step in STEPS[: len(FIRST)]) < 400
    assert max(step.expected_s for step in STEPS) < 160 and max(step.maximum_s for step in STEPS) <= 400


def test_the_cases_for_the_sanitizer_exist() -> None:
    (command,) = (step.command for step in STEPS if step.name == "sanitizer")
    cases = re.findall(r"'(tests/\S+?::[^']+)'", command)
    asked = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *cases]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert {line for line in found.stdout.splitlines() if "::" in line} == {*cases} and len(cases) >= 8


def test_every_step_is_what_there_is() -> None:
    steps = (*STEPS, *LLAMA_STEPS)
    assert len({step.name for step in steps}) == len(steps)
    assert all(step.expected_s <= step.maximum_s for step in steps)
    for step in steps:
        command = step.command.format(models="M", results="R", run="N", sources="S", llama="L")
        tests = re.findall(r"tests/kernels/cuda[\w/.]*", command)
        assert all((ROOT / path).exists() for path in tests), command
        for script, options in re.findall(r"python (benchmarks/\S+\.py)([^&]*)", f"{step.needs} && {command}"):
            source = (ROOT / script).read_text() + (ROOT / "benchmarks/shape.py").read_text()
            named = [option for option in re.findall(r"--([\w-]+)", options) if f'"--{option}"' not in source]
            assert {option.replace("-", "_") for option in named} <= {"kv_heads", "context", "layers"}, script


NEED_NO_GPU = {"test_shim.py", "test_compile.py", "test_nvrtc.py", "test_cupy_device.py", "test_old_gpus.py"}
NEED_NO_GPU |= {"gpus", "runtime", "benchmarks/test_first_run.py", "benchmarks/test_kit.py"}


def test_every_test_that_needs_a_gpu_is_in_a_step() -> None:
    folder = ROOT / "tests/kernels/cuda"
    named = {path for step in STEPS for path in re.findall(r"tests/kernels/cuda/([\w/.]+)", step.command)} | NEED_NO_GPU
    tests = [path.relative_to(folder) for path in folder.rglob("test_*.py")]
    assert [str(path) for path in tests if not {str(path), str(path.parent)} & named] == []
    assert sorted(name for name in named if not (folder / name).exists()) == []


def test_changed_kernels_are_other_sources(tmp_path: Path) -> None:
    kernel = tmp_path / "kernels/cuda/src/rows.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("one")
    before = sources_digest(tmp_path)
    (tmp_path / "README.md").write_text("not run")
    assert sources_digest(tmp_path) == before
    kernel.write_text("another")
    assert sources_digest(tmp_path) != before


def test_results_of_another_version_are_run_again(tmp_path: Path) -> None:
    step = counted("one", tmp_path)
    assert run(tmp_path, step) == 0
    found = json.loads((tmp_path / "steps.json").read_text())
    found["one"]["commit"] = found["one"].pop("sources")
    (tmp_path / "steps.json").write_text(json.dumps(found))
    assert run(tmp_path, step) == 0 and ran(tmp_path) == ["one", "one"]


def test_wrong_bits_in_a_vital_step_are_an_ordinary_failure(tmp_path: Path) -> None:
    gpu = replace(counted("gpu", tmp_path, f"exit {DIFFERENT}"), is_vital=True)
    assert run(tmp_path, gpu, counted("later", tmp_path)) == 1 and ran(tmp_path) == ["gpu", "later"]


def test_one_kernel_is_compared(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_kernel.difference(device) == ""
    monkeypatch.setattr(one_kernel, "KERNEL", "elementwise.rows.mul_rows")
    assert "5001 sums differ, first " in one_kernel.difference(device)


def test_nothing_follows_a_vital_step_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, later = counted("gpu", tmp_path, "echo no driver; exit 127"), counted("later", tmp_path)
    for calls in (1, 2):
        assert run(tmp_path, replace(gpu, is_vital=True), later) == 1 and ran(tmp_path) == calls * ["gpu"]
        said = capsys.readouterr().err
        assert "FAILED (127): no driver" in said
        assert f"no other step can pass without gpu: see {tmp_path}/{calls:03}-gpu.log" in said


OUTCOME = {"status": 0, "seconds": 1, "sources": "c1", "log": "001-gpu.log", "tail": ["passed"]}
WRONG = [("status", True), ("status", 0.0), ("status", "0"), ("status", None), ("seconds", "1"), ("seconds", False)]
WRONG += [("sources", 1), ("log", None), ("tail", "passed"), ("tail", [1]), ("tail", {"a": 1})]
DAMAGED = ["", "{bad", "[1]", '{"gpu": 5}', "[" * 100_000, "\ud800"]
DAMAGED += [json.dumps({"gpu": OUTCOME, "call": OUTCOME | {name: value}}) for name, value in WRONG]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_results_are_named(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "steps.json").write_bytes(damaged.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match=r"steps.json has no outcomes of steps; remove it"):
        first_run.main([str(tmp_path), "--models", str(tmp_path)])


@pytest.mark.parametrize("minutes", ["nan", "inf", "0", "-1", "ten"])
def test_minutes_are_a_time(tmp_path: Path, minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        first_run.main([str(tmp_path), "--minutes", minutes])
    assert "--minutes: must be a number above 0" in capsys.readouterr().err


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(json.dumps({"gpu": OUTCOME}))
    assert Record(tmp_path, "c1").outcome(counted("gpu", tmp_path)) == Outcome(0, 1, "c1", "001-gpu.log", ("passed",))


@pytest.mark.parametrize("name", ["steps.json", "steps.tmp"])
def test_folders_in_the_way_of_results_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"{name}: not a regular file; remove it"):
        first_run.main([str(tmp_path), "--models", str(tmp_path)])


def test_a_llama_bench_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o644)
    wrong = {"nowhere": r"no such file; docs/internals/gpu-kernels.md", "file": "not a program", ".": "a folder"}
    for name, words in wrong.items():
        with pytest.raises(UsageError, match=f"--llama-bench .*{words}"):
            first_run.main([str(tmp_path / "results"), "--llama-bench", str(tmp_path / name)])
    assert not (tmp_path / "results").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "STEPS", (counted("one", tmp_path),))
    given = [str(tmp_path), "--models", str(tmp_path)]
    with only_run(tmp_path), pytest.raises(UsageError, match=f"^another run uses {tmp_path}$"):
        first_run.main(given)
    assert not (tmp_path / "ran").exists()
    assert first_run.main(given) == 0 and ran(tmp_path) == ["one"]


def test_outcomes_and_mistakes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file: not a folder"):
        first_run.main([str(tmp_path / "file")])
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(UsageError, match="link: a link to nothing"):
        first_run.main([str(tmp_path / "link")])
    assert Outcome(0, 1.0, "c", "", ()).passed and not Outcome(124, 1.0, "c", "", ()).passed
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        first_run.main([str(tmp_path), "--models", "nowhere"])
