"""The benchmark of served groups: clusters have the same answers, and emulated links take the time that was set."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamaclust.core.errors import LlamaclustError
from support.clusters.forked_commands import forked_script
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "groups"))
from emulation import Emulation, LinkSpeed
from measuring.compiler import compiler
from served_figures import Depth, Sample, Turn, rows
from streams import _read
from ways import Reading, ways_of

FOLDER = ROOT / "benchmarks" / "groups"
NOTHING = Reading(0.0, 0.0, (0.0,))


@pytest.fixture
def emulation(tmp_path: Path) -> Emulation:
    if compiler() is None:
        pytest.skip("no C++ compiler found")
    return Emulation.build(tmp_path)


@pytest.mark.parametrize(
    ("speed", "least_us"), [(LinkSpeed(2.0), 1000), (LinkSpeed(0.5), 250), (LinkSpeed(0.0, 0.05), 2621)]
)
def test_an_exchange_of_16_kib_takes_what_the_emulated_link_does(
    emulation: Emulation, speed: LinkSpeed, least_us: float
) -> None:
    emulation.set(speed)
    assert emulation.exchange_us((0, 0), count=20) >= least_us


def test_members_that_park_have_the_emulated_delay_as_well(emulation: Emulation, tmp_path: Path) -> None:
    emulation.set(LinkSpeed(6.0))
    sizes = ("--kib", "1", "--gathers", "20", "--turns", "1", "--late-ms", "0", "--json", str(tmp_path / "rows"))
    subprocess.run([*emulation.prefix(0), sys.executable, str(FOLDER / "link.py"), *sizes], check=True, timeout=120.0)
    costs = {row["way"]: row for row in map(json.loads, (tmp_path / "rows").read_text().splitlines())}
    assert costs["plain"]["median_us"] >= 3000
    assert costs["plain"]["processor_us"] < 2000  # of its 3 ms; the loop, which is another caller, has no delay


def test_answers_of_all_ways_are_compared_and_timed(tmp_path: Path) -> None:
    sizes = ("--hidden", "512", "--tokens", "4", "--prompt", "32", "--together", "2", "--repeats", "1")
    done = forked_script(
        FOLDER / "served.py",
        *("1.1b", "Q8_0", *sizes, "--ways", "stages", "--delays", "0", "--local"),
        folder=tmp_path,
        within_s=240.0,
        LLAMACLUST_STATE_DIR=str(tmp_path / "state"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "22 layers: same ids and logprobs" in done.stdout
    assert len(re.findall(r"^(?:one worker|stages) +[\d.]+ +[\d.]+ +[\d.]+ \(", done.stdout, re.MULTILINE)) == 2 * 3


def turns(*ms: tuple[float, float]) -> list[Turn]:
    return [{"one worker": Sample(one, NOTHING), "group": Sample(group, NOTHING)} for one, group in ms]


@pytest.mark.parametrize(
    ("depth", "few", "whole_ms", "gain"),
    [
        (Depth(32, 2, 32), [], (36.0, 20.0), 36 / 20),
        (Depth(8, 2, 32), turns((12.0, 8.0)), (132.0, 68.0), 132 / 68),  # 4 ms a layer and 4, 2 ms and 4
        (Depth(8, 2, 32), turns((9.0, 40.0)), (144.0, 20.0), 144 / 20),  # nothing but layers; nothing of layers
    ],
)
def test_what_does_not_depend_on_layers_counts_once(
    depth: Depth, few: Sequence[Turn], whole_ms: tuple[float, float], gain: float
) -> None:
    deep = turns((36.0, 20.0))
    found = {row.way: row for row in rows(deep, few, depth, ("one worker", "group"), {"group": 25.0})}
    assert (found["one worker"].whole_ms, found["group"].whole_ms) == pytest.approx(whole_ms)
    assert found["group"].ratios == pytest.approx((gain,))
    assert " 25.00 +25 % " in str(found["group"]) and "%" not in str(found["one worker"])


def test_plans_of_the_ways() -> None:
    one, stages, group = ways_of((0, 1, 1), (2, 1, 1), (1.0, 1.0, 1.0))
    assert one.plan(5) == [{"worker": "a", "layers": [0, 5]}]
    assert [stage["layers"] for stage in stages.plan(5)] == [[0, 1], [1, 3], [3, 5]]
    assert group.plan(5) == [{"workers": ["a", "b", "c"], "layers": [0, 5], "shares": [2, 1, 1]}]
    assert [way.name for way in ways_of((0, 1), (2, 1), (1.0, 0.5))] == ["one worker", "group"]


def test_events_with_several_tokens_and_errors() -> None:
    events = [{"choices": [{"text": "x", "token_ids": ids}]} for ids in ([1], [2, 3], [], [4])]
    lines = [(5_000_000 * (1 + number), f"data: {json.dumps(event)}\n".encode()) for number, event in enumerate(events)]
    answer = _read(1_000_000, [*lines, (30_000_000, b"data: [DONE]\n")])
    assert (answer.ids, answer.first_ms, answer.token_ms) == ((1, 2, 3, 4), 4.0, 5.0)
    with pytest.raises(LlamaclustError, match="an answer ended: late"):
        _read(0, [(1, b'data: {"error": "late"}\n')])
