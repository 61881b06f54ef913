"""Benchmarks of plans: they run to their end on a tiny model. On a machine that others use, figures are anything."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.forked_commands import forked_script
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    build_tiny_model(folder / "Q8_0.gguf", quant_type=QuantType.Q8_0, layers=2)
    return folder


def run(folder: Path, script: str, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Without the time of imports."""
    state = str(folder / "state")
    done: subprocess.CompletedProcess[str] = forked_script(
        ROOT / "benchmarks" / script, *arguments, folder=folder, within_s=120.0, LLAMACLUST_STATE_DIR=state
    )
    assert done.returncode in codes and done.stderr == ""
    return done.stdout


def test_quant_types(folder: Path) -> None:
    options = ("--types", "Q8_0", "--models", ".", "--threads", "1", "--repeats", "1", "--json", "plans.jsonl")
    text = run(folder, "quant_types/plan_types.py", *options)
    assert re.search(r"^token by products: [01] of 1 types within 15%", text, re.MULTILINE)
    assert json.loads((folder / "plans.jsonl").read_text())["measured"]["prompt"] > 0
    assert len(run(folder, "quant_types/plan_types.py", "--table", "plans.jsonl").splitlines()) == 3


def test_plan_experts(folder: Path) -> None:
    model = build_tiny_model(folder / "experts.gguf", quant_type=QuantType.Q8_0, layers=4, experts=8)
    options = ("--only", "processes", "--repeats", "1", "--json", "rows.json")
    out = run(folder, "plan_experts.py", model.name, *options, codes=(0, 1))
    (row,) = [json.loads(line) for line in (folder / "rows.json").read_text().splitlines()]
    assert len(row["predicted"]) == 2 and row["touched_bytes"] < row["weight_bytes"]
    assert re.search(r"^  prefill of 512, ms +predicted +[\d.]+  measured +[\d.]+  ratio", out, re.MULTILINE)
