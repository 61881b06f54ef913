"""Tests of benchmarks/gpu_support/first_run.py: passed steps are not repeated, others run in the next call."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.core.errors import UsageError
from support.clusters.command_line import eventually
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from gpu_support import first_run
from gpu_support.first_run import LLAMA_STEPS, STEPS, Outcome, Record, Step, run_steps
from gpu_support.folders import only_run
from gpu_support.sources import sources_digest


def counted(name: str, folder: Path, then: str = "true", limit_s: int = 20) -> Step:
    return Step(name, limit_s, f"echo {name} >> {folder}/ran; {then}")


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split()


def places(folder: Path) -> dict[str, str]:
    return {"models": str(folder), "results": str(folder), "llama": "llama-bench"}


def run(folder: Path, *steps: Step, budget_s: float = 1000.0, sources: str = "c1") -> int:
    return run_steps(steps, Record(folder, sources), places(folder), budget_s, time.monotonic)


def test_passed_steps_are_not_repeated_and_failed_ones_come_last(tmp_path: Path) -> None:
    bad = counted("bad", tmp_path, "echo what it said; exit 3")
    good, later = counted("good", tmp_path), counted("later", tmp_path)
    assert run(tmp_path, bad, good) == 1
    found = json.loads((tmp_path / "steps.json").read_text())["bad"]
    assert (found["status"], found["sources"], found["tail"]) == (3, "c1", ["what it said"])
    assert run(tmp_path, replace(bad, command=f"echo bad >> {tmp_path}/ran"), good, later) == 0
    assert ran(tmp_path) == ["bad", "good", "later", "bad"]
    assert run(tmp_path, bad, good, later) == 0 and len(ran(tmp_path)) == 4
    assert run(tmp_path, good, sources="c2") == 0 and ran(tmp_path)[-1] == "good"


def test_steps_that_would_end_too_late_are_left(tmp_path: Path) -> None:
    long, short = counted("long", tmp_path, limit_s=500), counted("short", tmp_path)
    assert run(tmp_path, long, short, budget_s=300) == 75
    assert ran(tmp_path) == ["short"]
    assert run(tmp_path, long, short, budget_s=501) == 0
    assert ran(tmp_path) == ["short", "long"]


def test_a_step_ends_at_its_limit_with_all_of_its_processes(tmp_path: Path) -> None:
    hanging = counted("hanging", tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait", limit_s=1)
    assert run(tmp_path, hanging) == 1
    outcome = Record(tmp_path, "c1").outcome(hanging)
    assert outcome is not None and outcome.status == 124
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    eventually(lambda: not child.exists() or "Z" in (child / "stat").read_text(), 60.0, "the end of the child")


def partial(folder: Path, then: str = "exit 1") -> str:
    """Returns a command that does not end by itself, and removes its file at SIGTERM."""
    loop = "while :; do sleep 0.05; done"
    return f"bash -c 'trap \"rm {folder}/part; {then}\" TERM; touch {folder}/part; {loop}' && true"


def test_what_is_ended_removes_its_partial_files(tmp_path: Path) -> None:
    assert run(tmp_path, Step("writer", 1, partial(tmp_path))) == 1
    outcome = Record(tmp_path, "c1").outcome(Step("writer", 1, ""))
    assert outcome is not None and outcome.status == 124 and outcome.seconds < first_run._GRACE_S
    assert not (tmp_path / "part").exists() and (tmp_path / "writer.log").exists()


def test_what_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "_GRACE_S", 0.5)
    step = Step("deaf", 1, f"trap '' TERM; echo $$ > {tmp_path}/deaf; while :; do sleep 0.05; done")
    assert run(tmp_path, step) == 1
    assert not (Path("/proc") / (tmp_path / "deaf").read_text().strip()).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_step_as_its_limit_does(tmp_path: Path, number: signal.Signals) -> None:
    lines = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)",  # the tests may have started with it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r})",
        "from gpu_support import first_run",
        f"first_run.STEPS = (first_run.Step('writer', 60, {partial(tmp_path)!r}),)",
        f"with first_run.ends_in_one_line(): first_run.main([{str(tmp_path)!r}, '--models', {str(tmp_path)!r}])",
    )
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stderr=subprocess.PIPE, text=True)
    try:
        eventually((tmp_path / "part").exists, 60.0, "the partial file")
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number and "Traceback" not in err
    assert not (tmp_path / "part").exists()


def test_models_are_written_when_they_are_missing(tmp_path: Path) -> None:
    step = Step("model", 20, "cat {models}/m >> {results}/ran", "echo written > {models}/m", "m")
    assert run(tmp_path, step) == 0 and run(tmp_path, replace(step, name="again")) == 0
    (tmp_path / "m").write_text("kept")
    assert run(tmp_path, replace(step, name="third")) == 0
    assert ran(tmp_path) == ["written", "written", "kept"]


def test_every_step_fits_into_one_call_and_is_what_there_is() -> None:
    steps = (*STEPS, *LLAMA_STEPS)
    assert len({step.name for step in steps}) == len(steps)
    assert max(step.limit_s for step in steps) < 9 * 60
    for step in steps:
        command = step.command.format(models="M", results="R", llama="L")
        tests = re.findall(r"tests/kernels/cuda\S*", command)
        assert all((ROOT / path).exists() for path in tests), command
        for script, options in re.findall(r"python (benchmarks/\S+\.py)([^&]*)", f"{step.needs} && {command}"):
            source = (ROOT / script).read_text() + (ROOT / "benchmarks/shape.py").read_text()
            named = [option for option in re.findall(r"--([\w-]+)", options) if f'"--{option}"' not in source]
            assert {option.replace("-", "_") for option in named} <= {"kv_heads", "context", "layers"}, script
    tested = {path for step in STEPS for path in re.findall(r"tests/kernels/cuda/(\S+)", step.command)}
    own = {"test_shim.py", "test_compile.py", "test_nvrtc.py", "test_cupy_device.py", "test_old_gpus.py"}
    every = {path.name for path in (ROOT / "tests/kernels/cuda").glob("test_*.py")}
    every |= {"stages", "placement", "benchmarks/test_gpu_benchmark.py", "benchmarks/test_gpu_mixtures.py"}
    assert every - own == tested


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


def test_nothing_follows_a_vital_step_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, later = counted("gpu", tmp_path, "echo no driver; exit 127"), counted("later", tmp_path)
    for calls in (1, 2):
        assert run(tmp_path, replace(gpu, is_vital=True), later) == 1 and ran(tmp_path) == calls * ["gpu"]
        said = capsys.readouterr().err
        assert (
            "FAILED (127): no driver" in said and f"no other step can pass without gpu: see {tmp_path}/gpu.log" in said
        )


OUTCOME = {"status": 0, "seconds": 1, "sources": "c1", "tail": ["passed"]}
WRONG = [("status", True), ("status", 0.0), ("status", "0"), ("status", None), ("seconds", "1"), ("seconds", False)]
WRONG += [("sources", 1), ("tail", "passed"), ("tail", [1]), ("tail", {"a": 1})]
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
    assert Record(tmp_path, "c1").outcome(counted("gpu", tmp_path)) == Outcome(0, 1, "c1", ("passed",))


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
    assert Outcome(0, 1.0, "c", ()).passed and not Outcome(124, 1.0, "c", ()).passed
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        first_run.main([str(tmp_path), "--models", "nowhere"])
