"""Tests of benchmarks of groups: prefill on two members, and the cost of a gather."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from llamaclust.kernels._native import tls_library
from support.clusters.forked_commands import forked_script
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from emulated.emulation import compiler

RUN = ROOT / "benchmarks/run.py"


def test_a_prompt_has_the_bits_of_one_process(tmp_path: Path) -> None:
    if not tls_library():
        pytest.skip("built without OpenSSL")
    small = ("--hidden", "512", "--rows", "256", "--rounds", "1")
    done = forked_script(RUN, "prefill", "1.1b", "Q8_0", *small, folder=tmp_path, within_s=240.0)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^bands: 2 / one process, ms: [\d.]+", done.stdout, re.MULTILINE)


def test_what_a_gather_costs(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler found")
    sizes = ("--kib", "1", "--gathers", "20", "--rounds", "1", "--late-ms", "1")
    done = forked_script(RUN, "link", *sizes, "--json", "costs.jsonl", folder=tmp_path, within_s=120.0)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "costs.jsonl").read_text().splitlines()]
    ways = ["loop", "plain", "TLS"] if tls_library() else ["loop", "plain"]
    assert [row["variant"] for row in rows] == ways * 2
    assert all(row["p99 us"] >= row["us"] > 0 and row["processor us"] >= 0 for row in rows)
