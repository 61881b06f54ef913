"""Tests of the scripts in benchmarks/: they describe themselves, and they run with a tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.kernels import _native
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import Chain
from support.clusters.forked_commands import forked_script
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from public_shape import public_shape
from runner.llama import their_answers, their_speed
from runner.turns import check_same

FOLDER = ROOT / "benchmarks"

SCRIPTS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py") if "__main__" in path.read_text())
CASES = sorted(path.stem for path in FOLDER.glob("cases/*/*.py"))

LLAMA_BENCH = """#!/bin/sh
echo '[{"n_prompt": 16, "n_gen": 0, "avg_ts": 10.0}, {"n_prompt": 0, "n_gen": 2, "avg_ts": 5.0}]'
"""
"""A script that prints output like llama.cpp's llama-bench."""
ENCODE_TILE = "#!/bin/sh\nwhile read line; do echo 1000; done\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    build_tiny_model(folder / "Q8_0.gguf", quant_type=QuantType.Q8_0, layers=2)
    build_tiny_model(folder / "longer.gguf", quant_type=QuantType.Q8_0, layers=2, context=512)
    build_tiny_model(folder / "longest.gguf", quant_type=QuantType.Q8_0, layers=2, context=4096)
    build_tiny_model(folder / "experts.gguf", quant_type=QuantType.Q8_0, layers=4, experts=8)
    (folder / "models").mkdir()
    (folder / "models" / "Q8_0.gguf").symlink_to(folder / "Q8_0.gguf")
    for name, text in (("llama-bench", LLAMA_BENCH), ("encode_tile", ENCODE_TILE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a forked process, which saves the time of imports."""
    state = str(folder / "state")
    return forked_script(FOLDER / script, *arguments, folder=folder, within_s=120.0, LLAMACLUST_STATE_DIR=state)


def output(folder: Path, script: str, *arguments: str) -> str:
    done = run(folder, script, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.startswith("runner/")])
def test_every_script_says_what_it_does(folder: Path, script: str) -> None:
    done = run(folder, script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {Path(script).name}")


@pytest.mark.parametrize("case", CASES)
def test_every_case_says_what_it_does(folder: Path, case: str) -> None:
    done = run(folder, "run.py", case, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: run.py {case}") and "--against" in done.stdout


MODEL = "Q8_0.gguf"
ONE = ("--rounds", "1")
SMALL_HEAD = ("--layers", "2", "--hidden", "256", "--vocabulary", "400")
SMALL_ENCODER = ("--layers", "1", "--threads", "1")
LLAMA = ("--prompt", "16", "--generate", "2", "--threads", "1", "--runs", "1", *ONE, "--llama-bench", "llama-bench")
TINY = {
    "compare": (MODEL, *LLAMA),
    "encode": ("--shapes", "smolvlm-500m", "--encode-tile", "encode_tile", *SMALL_ENCODER, *ONE),
    "image_gaps": ("--text-layers", "1", "--quiet", "1", *SMALL_ENCODER, *ONE),
    "hop": (MODEL, "--steps", "20", *ONE),
    "kernels": ("--types", "Q8_0", "--shapes", "2048x2048", "--tokens", "1,8", "--threads", "1", *ONE),
    "load": (MODEL, "--threads", "1", *ONE),
    "busy_core": (MODEL, "--threads", "2", "--prompt", "9", "--prefills", "1", "--tokens", "2", *ONE),
    "native_step": ("--rows", "1,8", "--calls", "2", *ONE),
    "product_rates": ("--types", "Q8_0,IQ1_S", *ONE),
    "serving": (MODEL, "--streams", "2", "--seconds", "3", "--prompt-tokens", "8", "--tokens", "16", *ONE),
    "split": (MODEL, "--tokens", "4", *ONE),
    "streaming": (MODEL, "--threads", "1", "--streams", "1,2", "--tokens", "8", *ONE),
    "structured": (MODEL, "--threads", "1", "--tokens", "4", *ONE),
    "journal": (MODEL, "--requests", "8", "--connections", "2", *ONE),
    "memory": (MODEL, "--threads", "1", "--context", "64"),
    "kv_disk": ("longest.gguf", "--workers", "1", "--prefix", "200", *ONE),
    "gaps": ("longest.gguf", "--parts", "breakers", "--streams", "1", "--quiet", "1"),
    "attacks": ("longest.gguf", "--attack", "choices,fixed_texts,chunks", "--at-once", "1", "--streams", "1"),
    "plan": (MODEL, MODEL, "--shapes", "one", *ONE),
    "plan_experts": ("experts.gguf", *ONE),
    "plan_types": ("--types", "Q8_0", "--folder", "models", "--threads", "1", *ONE),
    "replay": ("longer.gguf", "--acceptance", "0,1", "--tokens", "60", "--together", "2", *ONE),
    "texts": ("longer.gguf", "--kinds", "prose", "--tokens", "16", "--characters", "200", *ONE),
    "mtp": (*SMALL_HEAD, "--stages", "1", "--prompt", "9", "--tokens", "40", "--threads", "1", *ONE),
    "draft_model": ("--hidden", "512", "--strengths", "0", "--tokens", "20", "--threads", "1", *ONE),
    "convert": ("checkpoint", "--shape", "1.1b", "--layers", "1", "--types", "f16"),
}
"""Arguments of a small run, by case."""
VARIANTS = {
    "compare": {"llama.cpp", "llamaclust"},
    "encode": {"mtmd", "llamaclust"},
    "image_gaps": {"a new image", "asked again", "text alone", "beside an image"},
    "hop": {"in process", "one worker", "two workers"},
    "kernels": {"Q8_0    2048x2048 LEVEL   1 far", "Q8_0    2048x2048 LEVEL   8 far"},
    "load": {"and packing", "from the file", "packed", "packed, copied"},
    "busy_core": {"quiet", "nice 10", "nice 0"},
    "native_step": {"plain", "states", "adapters", "drafts", "matchers"},
    "product_rates": {"Q8_0", "IQ1_S"},
    "serving": {"llamaclust"},
    "split": {"one worker", "two workers"},
    "streaming": {"bench", "HTTP"},
    "structured": {"free", "bound"},
    "journal": {"without", "with"},
    "kv_disk": {"computed", "restarted"},
    "gaps": {"nothing else", "8 x 64 breakers", "and a killed worker"},
    "attacks": {"choices", "fixed_texts", "chunks"},
    "plan": {"small, one worker of one thread"},
    "plan_experts": {"three processes"},
    "plan_types": {"Q8_0"},
    "memory": {"Q8_0 1: [0, 2)", "Q8_0 2: [0, 1)", "Q8_0 2: [1, 2)"},
    **{name: {"plain", "drafted"} for name in ("replay", "texts", "draft_model")},
    "mtp": {"plain", "head"},
    "convert": {"convert", "dd", "dd that reads"},
}
NOT_EXACT = {"memory"}
"""Cases that can fail with tiny models."""


@pytest.mark.parametrize("case", TINY)
def test_a_case_measures_its_variants(folder: Path, case: str) -> None:
    """Each figure of each variant is above 0 or missing."""
    if case == "streaming" and shutil.which("curl") is None:
        pytest.skip("curl is not here")
    written = folder / f"{case}.jsonl"
    done = run(folder, "run.py", case, *TINY[case], "--json", str(written))
    assert case in NOT_EXACT or (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    level = _native.available_levels()[-1]
    assert {row["variant"] for row in rows} == {name.replace("LEVEL", level) for name in VARIANTS[case]}
    assert all(name in out for name in {row["variant"] for row in rows})
    figures = [[value for value in list(row.values())[3:] if isinstance(value, float)] for row in rows]
    assert all(any(value > 0 for value in each) for each in figures)


def test_soak(folder: Path) -> None:
    done = run(folder, "run.py", "soak", "longer.gguf", "--minutes", "0.05", "--streams", "8", "--tokens", "8")
    assert done.returncode in (0, 1), done.stderr  # The memory of a short run may still grow.
    assert re.search(r"^   1 worker b +\d", done.stdout, re.MULTILINE)
    assert re.search(r" 0  [1-9]\d* answers, [1-9]\d+ tokens: 0 lost, 0 changed ", done.stdout)


def test_chaos(folder: Path) -> None:
    options = ("--minutes", "0.1", "--streams", "2", "--workers", "2", "--faults", "kill,coordinator-kill")
    done = run(folder, "run.py", "chaos", "longer.gguf", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^   1 SIGKILL of (a worker|the coordinator) +[1-9]", done.stdout, re.MULTILINE)


def test_answers_that_differ_end_a_case() -> None:
    with pytest.raises(LlamaclustError, match="group: b and a differ in ids"):
        check_same("group", {"a": {"ids": b"1", "s": 1.0}, "b": {"ids": b"2", "s": 2.0}})


def test_another_checkout_takes_turns(folder: Path, tmp_path: Path) -> None:
    """The other checkout's interpreter runs the same case. In this test, both checkouts are the same tree."""
    (tmp_path / "tree").symlink_to(ROOT)
    written = tmp_path / "rows.jsonl"
    options = ("--types", "Q8_0", "--rounds", "2", "--json", str(written), "--against", str(tmp_path / "tree"))
    out = output(folder, "run.py", "product_rates", *options)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["other", "this"] * 2 and rows[0]["group"] == "Q8_0"
    assert re.search(r"^this / other, peak_share: \d", out, re.MULTILINE)


REFUSED = [
    ("kernels", ("--tokens", "0"), "must be 1 or more"),
    ("kernels", ("--threads", "5000"), "the limit is 1024"),
    ("kernels", ("--rounds", "0"), "must be 1 or more"),
    ("kernels", ("--levels", "sse"), "choose from generic"),
    ("kernels", ("--shapes", "3x3"), "give ROWSxCOLS with 65536 weights or more"),
    ("kernels", ("--shapes", "512by512"), "give ROWSxCOLS"),
    ("kernels", ("--shapes", "1000x1000", "--types", "Q4_K"), "a number of columns that 256 divides"),
    ("kernels", ("--types", "Q9"), "choose from F32, F16"),
    ("compare", (MODEL, "--llama-bench", "nope"), "no such file; the docstring of benchmarks/runner/llama.py says"),
    ("compare", (MODEL, "--llama-bench", "."), "a folder"),
    ("compare", (MODEL, "--llama-bench", "words"), "not a program that can be run"),
    ("encode", ("--encode-tile", "nope"), "record_mtmd.py says how to build it"),
    ("compare", ("nope.gguf", "--llama-bench", "llama-bench"), "nope.gguf: no such file"),
    ("split", ("nope.gguf",), "nope.gguf: no such file"),
    ("nope", (), "compare"),
]


@pytest.mark.parametrize(("case", "arguments", "words"), REFUSED)
def test_mistakes_are_said_before_anything_runs(
    folder: Path, case: str, arguments: tuple[str, ...], words: str
) -> None:
    (folder / "words").write_text("words\n")
    done = run(folder, "run.py", case, *arguments)
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_schema_suite(folder: Path) -> None:
    tests = [{"description": "", "data": data, "valid": data == 1} for data in (1, 2)]
    name = "jsonschema-0/json/tests/draft2020-12/const.json"
    groups = [{"description": "", "schema": {"const": 1}, "tests": tests}, {"schema": {"not": {}}, "tests": tests}]
    with tarfile.open(folder / "suite.tar.gz", "w:gz") as archive:
        entry, content = tarfile.TarInfo(name), json.dumps(groups).encode()
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    text = output(folder, "suites/schema_suite.py", "--source", "suite.tar.gz")
    assert text == "schemas: 2\nvalid: 1\ninvalid: 1\nrefused: 1\n"


def test_maskbench(folder: Path) -> None:
    (folder / "schemas").mkdir()
    tests = [{"data": data, "valid": data == 1} for data in (1, 2)]
    for number, schema in enumerate([{"const": 1}, {"const": 2}, {"not": {}}]):
        (folder / "schemas" / f"{number}.json").write_text(json.dumps({"schema": schema, "tests": tests}))
    lines = output(folder, "suites/maskbench.py", "schemas").splitlines()
    assert {"schemas: 3", "schemas, passed: 1", "schemas, refused: 1"} <= {*lines}
    assert {"valid instances, judged wrongly: 1", "invalid instances, judged wrongly: 1"} <= {*lines}


def other_bench(folder: Path, answer: str) -> Path:
    program = folder / "other-bench"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("answer", ["echo hello", "echo '[]'", "echo '{}'", "echo no >&2; exit 1"])
def test_what_answers_otherwise_is_no_llama_bench(folder: Path, answer: str) -> None:
    program = other_bench(folder, answer)
    with pytest.raises(UsageError, match=str(program)):
        their_speed(program, their_answers(program, Path("Q8_0.gguf"), ()))


def test_documented_shapes_are_known() -> None:
    """Commands in the documentation and the programs name known shapes."""
    places = [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", *FOLDER.rglob("*.py")]
    specs = {spec for path in places for spec in re.findall(r"public_shape\.py ([a-z0-9.:_-]+)", path.read_text())}
    assert len(specs) > 1
    for spec in specs | {"gemma-3-1b-it:q8_0", "smollm2-1.7b-instruct:q4_k_m", "ernie-4.5-21b-a3b"}:
        assert public_shape(spec, {"layers": 3}).tensors
    with pytest.raises(UsageError, match="gemma-3-4b-it"):
        public_shape("gemma-3-4b", {})


def test_shape_of_a_public_model(tmp_path: Path) -> None:
    path = tmp_path / "shape.gguf"
    sizes = ("--layers", "4", "--vocabulary", "320", "--experts", "8")
    done = run(tmp_path, "public_shape.py", "qwen3.5-35b-a3b:q4_k_m", str(path), *sizes)
    assert done.returncode == 0, done.stderr
    model = Model.open(path)
    assert model.layer_count == 4 and model.has_states
    chain = Chain(CpuBackend(2), model)
    logits = chain.logits(range(40, 48))
    chain.close()
    assert np.isfinite(logits).all() and len(np.unique(logits.argmax(axis=1))) > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_is_interrupted_leaves_nothing(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The signal arrives while `shape.py` writes, or while a case measures."""
    with subprocess.Popen(
        [sys.executable, FOLDER / "shape.py", "7b", "Q8_0", tmp_path / "m.gguf"], stderr=subprocess.PIPE, text=True
    ) as process:
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err, list(tmp_path.iterdir())) == (128 + number, "", [])
    with subprocess.Popen(
        [sys.executable, FOLDER / "run.py", "kernels", "--types", "Q8_0", "--rounds", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")


CLUSTER = """
import asyncio, sys
sys.path.append(sys.argv[1])
from pathlib import Path
from runner.clusters import Layout, running

async def main():
    program = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    async with running(Path("m.gguf"), Layout(), [sys.executable, "-c", program]):
        pass

asyncio.run(main())
"""


def test_a_cluster_ends_with_its_benchmark(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER, FOLDER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        coordinator = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err, list(tmp_path.iterdir())) == (128 + signal.SIGTERM, "", [])
    with pytest.raises(ProcessLookupError):
        os.kill(coordinator, 0)
