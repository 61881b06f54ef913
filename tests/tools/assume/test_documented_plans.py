"""Checks that assumed plans in docs/models.md, docs/gpu.md and docs/several-machines.md equal the program's output."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.cluster.planner.speculation import predict_gain
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError
from llamaclust.tools.assume.assumed_model import assumed_model
from llamaclust.tools.assume.assumed_plan import Survey, plan_assumed, plan_shapes
from llamaclust.tools.assume.description import parse_machines
from llamaclust.tools.assume.gpu_models import GPU_MODELS
from llamaclust.tools.assume.planning import KEYS, AssumedCluster, prediction_of
from llamaclust.tools.assume.shapes import SHAPES
from support.paths import ROOT

PAGE = (ROOT / "docs/models.md").read_text()
GAINS_PAGE = (ROOT / "docs/internals/speculation.md").read_text()
EXAMPLE = re.compile(r"^```console\n\$ llamaclust (plan --assume [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [*EXAMPLE.findall(PAGE), *EXAMPLE.findall(GAINS_PAGE)]
EXCERPTS = re.findall(
    r"`llamaclust (plan --assume [^`]*)` prints \(excerpt\):\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)
GAINS = re.findall(r"^\| `(.*?)`[^|]* \| `(.*?)` \| (\S+)x \| (\S+)x \| (\S+)x \|$", GAINS_PAGE, re.MULTILINE)
ROWS = re.findall(r"^\| `([\w.:-]+)`: .*? \| ([\d.]+) GB \| ([\d.]+) \| ([\d.]+) s \|$", PAGE, re.MULTILINE)
GPU_PAGE = (ROOT / "docs/gpu.md").read_text()
GPU_TABLES = re.findall(r'--assume "([^"]* gpu)".*?\n((?:\|[^\n]*\n)+)', GPU_PAGE, re.DOTALL)
GPU_ROWS = [
    (machines, row)
    for machines, table in GPU_TABLES
    for row in re.findall(r"^\| `(.*?)` \| (\S+) GB \| (\S+) GB \| (.*?) \| (\S+) \| (\S+) ms \|$", table, re.MULTILINE)
]
NAMED_GPUS = re.findall(r"^\| `(\S+)` \| (\S+) \| (\S+) ms \| (\S+) \| (\S+) ms \|$", GPU_PAGE, re.MULTILINE)
SEVERAL = re.findall(
    r"^\| `([^`]*)`[^|]* \| (\S+ Gbit/s|-) \| (?:a group of (\d)|one machine) "
    r"\| (\S+) \| (\S+) \| (\S+) s \| (\S+) \|$",
    (ROOT / "docs/several-machines.md").read_text(),
    re.MULTILINE,
)
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])")


def output(words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    if done.exception is not None:
        assert isinstance(done.exception, LlamaclustError), done.exception
        return f"error: {done.exception}\n"
    return done.stdout


@pytest.mark.parametrize(("command", "printed"), EXAMPLES)
def test_examples_print_what_the_page_shows(command: str, printed: str) -> None:
    """Compares words exactly and figures to a hundredth, so that a kernel may change its workspace by a MiB."""
    found = output(shlex.split(command))
    assert NUMBER.sub("N", found) == NUMBER.sub("N", printed)
    figures = [[float(number) for number in NUMBER.findall(text)] for text in (found, printed)]
    assert figures[0] == pytest.approx(figures[1], rel=0.01, abs=1.01)


@pytest.mark.parametrize(("command", "shown"), EXCERPTS)
def test_lines_of_excerpts_are_printed_in_their_order(command: str, shown: str) -> None:
    lines, words = output(shlex.split(command)).splitlines(), shown.splitlines()
    printed = [line for line in lines if NUMBER.sub("N", line) in [NUMBER.sub("N", word) for word in words]]
    assert [NUMBER.sub("N", line) for line in printed] == [NUMBER.sub("N", word) for word in words]
    figures = [[float(number) for number in NUMBER.findall("\n".join(text))] for text in (printed, words)]
    assert figures[0] == pytest.approx(figures[1], rel=0.01, abs=1.01)


def test_the_page_has_examples_of_both_kinds() -> None:
    assert len(EXAMPLES) == 3 and len(EXCERPTS) == 3
    assert len(GAINS) == 4 and len(ROWS) == 6 and len(GPU_ROWS) == 6
    assert len(NAMED_GPUS) == 5 and len(SEVERAL) == 5
    assert sum(printed.startswith("error: ") for _, printed in EXAMPLES) == 1


@pytest.mark.parametrize(("machines", "network", "members", "token_ms", "gathers_ms", "ttft_s", "drafted"), SEVERAL)
def test_rows_of_a_large_model_are_those_of_the_program(
    machines: str, network: str, members: str, token_ms: str, gathers_ms: str, ttft_s: str, drafted: str
) -> None:
    printed = output(
        ["plan", "--assume", machines if network == "-" else f"{machines},{network}", "--model", "70b:q4_k_m"]
    )
    held = re.findall(r"^  (m[1-9+m]*): layers \[0, 80\)", printed, re.MULTILINE)
    assert [len(workers.split("+")) for workers in held] == [int(members or 1)]
    first = re.search(r"predicted: (\d+) ms/token(?: \((\d+) in gathers\))?, first token .* after (\d+) ms", printed)
    tok_s = re.search(r"with 80 % \((\S+) tok/s", printed)
    assert first is not None and tok_s is not None
    token, gathers, ttft = (float(figure or 0) for figure in first.groups())
    assert [token, gathers] == pytest.approx([float(token_ms), float(gathers_ms)], rel=0.01, abs=1.01)
    assert ttft / 1e3 == pytest.approx(float(ttft_s), rel=0.01)
    assert float(tok_s[1]) == pytest.approx(float(drafted), rel=0.01, abs=0.06)


@pytest.mark.parametrize(("model", "size_gb", "tok_s", "ttft_s"), ROWS)
def test_rows_are_those_of_the_program(model: str, size_gb: str, tok_s: str, ttft_s: str) -> None:
    found = plan_assumed("3x16GB@40GB/s,1Gbit", model, ())
    assert found.plan.prediction is not None
    assert found.model.file.size_bytes / 1e9 == pytest.approx(float(size_gb), abs=0.06)
    assert 1 / found.plan.prediction.token_s == pytest.approx(float(tok_s), abs=0.06)
    assert found.plan.prediction.ttft_s == pytest.approx(float(ttft_s), abs=0.06)


@pytest.mark.parametrize(("machines", "row"), GPU_ROWS)
def test_rows_of_machines_with_a_gpu_are_those_of_the_program(machines: str, row: tuple[str, ...]) -> None:
    name, size_gb, gpu_gb, in_ram, tok_s, ttft_ms = row
    model = assumed_model(name)
    plan = AssumedCluster(parse_machines(machines)).plan(model)
    gpu, *cpus = plan.stages[0].devices
    assert plan.prediction is not None and (gpu.start, gpu.device) == (0, "cuda:0")
    assert [model.file.size_bytes / 1e9, gpu.bytes / 1e9] == pytest.approx([float(size_gb), float(gpu_gb)], abs=0.06)
    predicted = [1 / plan.prediction.token_s, 1e3 * plan.prediction.ttft_s]
    assert predicted == pytest.approx([float(tok_s), float(ttft_ms)], rel=0.01, abs=0.6)
    if not cpus:
        assert in_ram == "nothing"
        return
    found = re.fullmatch(r"(\S+) GB, experts of (\d+) of (\d+) layers", in_ram)
    assert found is not None and cpus[0].is_experts
    assert cpus[0].bytes / 1e9 == pytest.approx(float(found[1]), abs=0.06)
    assert (len(gpu.cpu_moe), gpu.end) == (int(found[2]), int(found[3]))


def test_the_pages_name_every_shape_and_key() -> None:
    (listed,) = re.findall(r"^- \*\*MODEL\*\* is (.*?);", PAGE, re.MULTILINE | re.DOTALL)
    assert {name.lower() for name in re.findall(r"`([^`:]+)`", listed)} == SHAPES.keys()
    page = (ROOT / "docs/command-line.md").read_text()
    (keys,) = re.findall(r"^With `--assume`, `--set` accepts only (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    assert {*KEYS} == {*re.findall(r"`(\w+)`", keys)} - {"m1", "m2"}


@pytest.mark.parametrize("row", NAMED_GPUS, ids=lambda row: row[0])
def test_predictions_for_gpus_by_name_are_those_of_the_program(row: tuple[str, ...]) -> None:
    name, *shown = row
    cluster = AssumedCluster(parse_machines(f"32GB@40GB/s + {name}"))
    predictions = [prediction_of(cluster.plan(assumed_model(model))) for model in ("8b", "qwen3-30b-a3b")]
    found = [value for prediction in predictions for value in (1 / prediction.token_s, 1e3 * prediction.ttft_s)]
    assert found == pytest.approx(list(map(float, shown)), rel=0.01, abs=0.6)


def test_the_page_of_gpus_names_every_gpu() -> None:
    (listed,) = re.findall(r"^Names: ([^.]*)\.$", GPU_PAGE, re.MULTILINE)
    assert re.findall(r"`([^`]+)`", listed) == list(GPU_MODELS)


def test_the_command_refuses_what_it_would_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    @cache
    def survey(machines: str, overrides: tuple[str, ...]) -> Survey:
        return plan_shapes(machines, overrides, lambda name: None)  # cached for text and JSON, since it takes seconds

    def planned(machines: str, overrides: Sequence[str], planned: Callable[[str], None]) -> Survey:
        return survey(machines, tuple(overrides))

    monkeypatch.setattr("llamaclust.cli.plans.assumed_plan.plan_shapes", planned)
    example = ["plan", "--assume", "16GB@40GB/s"]
    assert "remove FILE, --workers and --mmproj" in output([*example, "--model", "8b", "--workers", "2"])
    assert "remove FILE, --workers and --mmproj" in output(["plan", "cluster.yaml", "--assume", "16GB@40GB/s"])
    assert "7b: LLaMA 2 7B Q4_K_M" in output(example)
    assert [model["name"] for model in json.loads(output([*example, "--json"]))["models"]] == list(SHAPES)
    assert "--model needs --assume MACHINES" in output(["plan", "--model", "8b"])
    values = json.loads(output([*example, "--model", "8b", "--json"]))
    assert values["stages"][0]["worker"] == "m1" and values["model"] == "LLaMA 3.1 8B"
    with pytest.raises(InsufficientMemoryError):
        plan_assumed("8GB@40GB/s", "70b", ())


@pytest.mark.parametrize("row", GAINS)
def test_gains_on_the_page_are_those_of_the_program(row: tuple[str, ...]) -> None:
    machines, model, *shown = row
    prediction = prediction_of(plan_assumed(machines, model, ()).plan)
    gains = [predict_gain(prediction, acceptance) for acceptance in (0.5, 0.8, 0.95)]
    found = [gain.gain for gain in gains if gain is not None]
    # The number of consecutive windows is whole: near a border, processors differ.
    assert found == pytest.approx(list(map(float, shown)), rel=0.1, abs=0.06)


def test_gains_are_predicted_for_the_acceptance_that_is_asked_for() -> None:
    example = ["plan", "--assume", "16GB@40GB/s", "--model", "8b"]
    assert "--acceptance needs --model MODEL" in output([*example[:3], "--acceptance", "0.8"])
    for wrong in ("80", "-0.1", "nan"):
        assert f"--acceptance: {float(wrong):g} is not an acceptance rate" in output([*example, "--acceptance", wrong])
    usual = json.loads(output([*example, "--json"]))["speculation"]
    assert [gain["acceptance"] for gain in usual] == [0.5, 0.8, 0.95]
    (given,) = json.loads(output([*example, "--json", "--acceptance", "0.8"]))["speculation"]
    assert given == usual[1] and given["gain"] > 1.5
    (line,) = (line for line in output([*example, "--acceptance", "0.8"]).splitlines() if "speculation: " in line)
    assert f"{given['gain']:.1f}x with 80 % of drafted tokens right" in line and "95 %" not in line
