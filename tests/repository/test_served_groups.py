"""Tests of the benchmark `served`: all clusters give the same answers, and emulated links have the chosen delay."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.clusters.forked_commands import forked_script
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from cases.groups.served import Depth, ways_of
from emulated.emulation import Emulation, LinkSpeed, compiler
from runner.streams import read_answer

RUN = ROOT / "benchmarks/run.py"


@pytest.fixture
def emulation(tmp_path: Path) -> Emulation:
    if compiler() is None:
        pytest.skip("no C++ compiler found")
    return Emulation.build(tmp_path)


@pytest.mark.parametrize(
    ("speed", "least_us"), [(LinkSpeed(2.0), 1000), (LinkSpeed(6.0), 3000), (LinkSpeed(0.0, 0.05), 1300)]
)
def test_a_gather_takes_what_the_emulated_link_does(
    emulation: Emulation, tmp_path: Path, speed: LinkSpeed, least_us: float
) -> None:
    """Waiting for the emulated link takes no processor time."""
    emulation.set(speed)
    sizes = ("--kib", "8", "--gathers", "20", "--rounds", "1", "--late-ms", "0", "--json", str(tmp_path / "rows"))
    subprocess.run([*emulation.prefix(0), sys.executable, str(RUN), "link", *sizes], check=True, timeout=120.0)
    costs = {row["variant"]: row for row in map(json.loads, (tmp_path / "rows").read_text().splitlines())}
    assert costs["plain"]["us"] >= least_us
    assert costs["plain"]["processor us"] < 2000


def test_answers_of_all_ways_are_compared_and_timed(tmp_path: Path) -> None:
    sizes = ("--hidden", "512", "--tokens", "4", "--prompt", "32", "--together", "2", "--rounds", "1")
    done = forked_script(
        RUN,
        *("served", "1.1b", "Q8_0", *sizes, "--ways", "stages", "--delays", "0", "--local"),
        folder=tmp_path,
        within_s=240.0,
        LLAMACLUST_STATE_DIR=str(tmp_path / "state"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"^all layers, \w+, round trip 0 ms: stages \d", done.stdout, re.MULTILINE)) == 3


@pytest.mark.parametrize(
    ("depth", "deep", "few", "whole_ms"),
    [
        (Depth(32, 2, 32), 36.0, [], 36.0),
        (Depth(8, 2, 32), 36.0, [12.0], 132.0),  # 4 ms per layer, and 4 ms in addition.
        (Depth(8, 2, 32), 36.0, [9.0], 144.0),  # All time depends on the layers.
        (Depth(8, 2, 32), 20.0, [40.0], 20.0),  # No time depends on the layers.
    ],
)
def test_what_does_not_depend_on_layers_counts_once(
    depth: Depth, deep: float, few: Sequence[float], whole_ms: float
) -> None:
    assert depth.whole_ms([deep], few) == pytest.approx([whole_ms])


def test_plans_of_the_ways() -> None:
    one, stages, group = ways_of((0, 1, 1), (2, 1, 1), (1.0, 1.0, 1.0))
    assert one.plan(5) == [{"worker": "a", "layers": [0, 5]}]
    assert [stage["layers"] for stage in stages.plan(5)] == [[0, 1], [1, 3], [3, 5]]
    assert group.plan(5) == [{"workers": ["a", "b", "c"], "layers": [0, 5], "shares": [2, 1, 1]}]
    assert [way.name for way in ways_of((0, 1), (2, 1), (1.0, 0.5))] == ["one worker", "group"]


def test_events_with_several_tokens() -> None:
    events = [{"choices": [{"text": "x", "token_ids": ids}]} for ids in ([1], [2, 3], [], [4])]
    lines = [(5.0 + 5 * number, json.dumps(event).encode()) for number, event in enumerate(events)]
    answer = read_answer(1.0, lines)
    assert (answer.ids, answer.first_s, answer.token_s) == ((1, 2, 3, 4), 4.0, 5.0)
