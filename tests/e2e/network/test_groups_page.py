"""Runs the commands of docs/several-machines.md#groups unchanged, on one machine that has all of the addresses. Groups
give the bits of one worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import command_line, eventually
from support.models.tiny_model import build_tiny_model
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, TOKENS, Answer, DistantCluster, eight, undisturbed
from support.paths import ROOT
from support.wire.group_links import needs_tls

pytestmark = needs_tls

GENERATIONS = eight(TOKENS)[:4]
LAYERS = 32  # The number of layers in the page's manual plan.
SECTION = (ROOT / "docs/several-machines.md").read_text().split("\n## Groups\n")[1].split("\n## ")[0]
FENCES = re.findall(r"^```(yaml|sh)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
FILE, BY_HAND = (text for kind, text in FENCES if kind == "yaml")
_, (UP,), WORKERS = (text.splitlines() for kind, text in FENCES if kind == "sh")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return build_tiny_model(folder / "tiny.gguf", quant_type=QuantType.Q8_0, layers=LAYERS, hidden=128, ffn=256)


@pytest.fixture(scope="module")
def answers(model: Path) -> list[Answer]:
    return undisturbed(model, GENERATIONS)


@contextmanager
def typed(model: Path, file: str, commands: list[str]) -> Iterator[DistantCluster]:
    """Runs a cluster with this cluster file, and starts workers with these commands."""
    addresses = dict.fromkeys(re.findall(r"\d+\.\d+\.\d+\.\d+", " ".join(commands)))
    with Box((COORDINATOR,)) as box, command_line() as line, ThreadPoolExecutor() as asking:
        box.configure(COORDINATOR, *(f"addr add {address}/24 dev eth0" for address in addresses))
        network = box[COORDINATOR].namespace
        found = re.search(r"^model: (\S+)", file, re.MULTILINE)
        assert found is not None and UP.startswith("llamaclust up ")
        (line.folder / found[1]).symlink_to(model)
        (line.folder / UP.split()[-1]).write_text(file)
        coordinator = line.start(*UP.split()[1:], network=network)
        coordinator.says("copy ")
        copied = re.search(r"copy (\S+) to each machine", coordinator.err.read_text())
        assert copied is not None
        words = [command.replace("FILE", copied[1]).split()[1:] for command in commands]
        workers = {each[each.index("--name") + 1]: line.start(*each, network=network) for each in words}
        coordinator.says("group is ready", 300.0)
        yield DistantCluster(box, line, coordinator, workers, asking)
        line.end_commands()


def test_the_automatic_plan_of_the_page_serves(model: Path, answers: list[Answer]) -> None:
    """The plan depends on this machine's speed. It has a group, or stages with a reason."""
    with typed(model, FILE, WORKERS) as cluster:
        assert cluster.answers(GENERATIONS) == answers
        status = cluster.status
        links = {worker["name"]: worker["link_address"] for worker in status["workers"]}
        assert links == {"a": "192.168.1.11:8200", "b": "192.168.1.12:8200"}
        assert status["choice"]["objective"] == "latency"
        printed = cluster.coordinator.err.read_text()
        assert "  objective: latency (a request alone: " in printed
        shown = r"^  ((a\+b|b\+a): layers \[0, 32\) in shares |not as a group .* tok/s .*: |no group is possible: )"
        assert len(re.findall(shown, printed, re.MULTILINE)) == 1


def test_the_plan_by_hand_of_the_page_serves(model: Path, answers: list[Answer]) -> None:
    names = ("desk", "tower", "laptop")
    commands = [
        WORKERS[0].replace("--name a", f"--name {name}").replace("192.168.1.11", f"192.168.1.1{number}")
        for number, name in enumerate(names, 1)
    ]
    with typed(model, BY_HAND, commands) as cluster:
        assert cluster.answers(GENERATIONS) == answers
        eventually(lambda: cluster.status["groups"][0]["gathers"] > 0, 60.0, "a heartbeat after the answers")
        status = cluster.status
        (group,) = status["groups"]
        assert [(member["worker"], member["share"]) for member in group["members"]] == [("desk", 2), ("tower", 1)]
        assert group["layers"] == [0, 20]
        assert status["choice"]["objective"] is None
        assert "  desk+tower: layers [0, 20) in shares 2:1" in cluster.coordinator.err.read_text()
