"""Compares the planner's choices with other plans, on random clusters of the benchmark `plan_grid`."""

from __future__ import annotations

import re
from pathlib import Path

from support.clusters.forked_commands import forked_script
from support.paths import ROOT
from support.seed import SEED


def test_no_other_plan_is_clearly_faster(tmp_path: Path) -> None:
    script, seed = ROOT / "benchmarks/run.py", str(SEED % 100_000)
    options = ("--count", "4", "--alternatives", "12", "--seed", seed)
    state = str(tmp_path / "state")
    done = forked_script(script, "plan_grid", *options, folder=tmp_path, within_s=300.0, LLAMACLUST_STATE_DIR=state)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^choices: [1-4] of 4 ", done.stdout, re.MULTILINE), done.stdout
