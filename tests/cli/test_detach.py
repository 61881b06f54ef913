"""Checks that `up --detach` and the demo leave nothing running if they are interrupted or killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.state.directory import ClusterDir
from support.clusters.command_line import CommandLine, Running, command_line, eventually
from support.models.hostile_models import slow_to_load, tiny
from support.paths import ROOT

TOLD = (signal.SIGTERM, signal.SIGHUP)
Moment = Callable[[CommandLine], Running]


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        slow_to_load(line.folder / "slow.gguf")
        yield line


def begun(line: CommandLine, model: str = "slow.gguf", before: Sequence[str] = ()) -> Running:
    """Starts a cluster and waits for the coordinator's process, which may not yet handle signals."""
    log = line.cluster_dir("tiny") / "logs" / "coordinator.log"
    log.unlink(missing_ok=True)
    running = line.start("up", "-d", line.cluster_file(model, context_length=64, max_sequences=2), before=before)
    eventually(lambda: log.exists() and len(line.left_running()) > 1, 60.0, "the coordinator's process")
    return running


def loading(line: CommandLine) -> Running:
    running = begun(line)
    running.says("worker a, layers 0-1: loading")
    return running


def nothing_left(line: CommandLine) -> None:
    eventually(lambda: not line.left_running(), 60.0, "the end of every process")
    folder = line.cluster_dir("tiny")
    assert not (folder / "cluster.json").exists() and not (folder / "run").exists()
    assert not ClusterDir(folder).is_running
    assert "Traceback" not in (folder / "logs" / "coordinator.log").read_text()


@pytest.mark.parametrize("number", TOLD)
@pytest.mark.parametrize("moment", [begun, loading])
def test_an_interrupted_start_has_ended_when_its_command_has(
    line: CommandLine, moment: Moment, number: signal.Signals
) -> None:
    running = moment(line)
    for _ in range(2):  # service managers and closed terminals may send more than one signal
        os.kill(running.process.pid, number)
    done = running.wait()
    assert done.code == 128 + number and "Traceback" not in done.err
    assert not line.left_running()
    nothing_left(line)


@pytest.mark.parametrize("moment", [begun, loading])
def test_a_start_ends_with_the_command_that_was_killed(line: CommandLine, moment: Moment) -> None:
    moment(line).kill()
    nothing_left(line)


def test_a_cluster_that_is_ready_goes_on_without_the_command_and_its_terminal(line: CommandLine) -> None:
    running = begun(line, "good.gguf", before=("nohup",))
    os.kill(running.process.pid, signal.SIGHUP)
    assert running.wait().code == 0
    assert line.run("status", "--json").out.startswith("{")
    assert line.run("down").code == 0
    nothing_left(line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_cluster(line: CommandLine, demo_model: Path, number: signal.Signals) -> None:
    line.set_variables(LLAMACLUST_HOME=str(environment().home))
    running = line.start(program=(sys.executable, ROOT / "examples/demo.py"))
    eventually(lambda: "llamaclust chat" in running.out.read_text(), 60.0, "a cluster that is ready")
    os.kill(running.process.pid, number)
    done = running.wait()
    assert done.code == 128 + number and "is stopped" in done.err and "Traceback" not in done.err
    eventually(lambda: not line.left_running(), 60.0, "the end of every process")
