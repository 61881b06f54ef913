"""`chaos` on real workers of a tiny model, and what it leaves."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import pytest

from llamaclust.cli.main import main
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.core.sampling import RowResult
from llamaclust.tools.chaos import load
from llamaclust.tools.chaos.tally import Answer, answer_rows
from support.clusters.command_line import Cluster, CommandLine, command_line, eventually
from support.models.hostile_models import tiny

DRAIN_AND_KILLS = 2604  # drain a, SIGKILL b, SIGSTOP b, ...
LONG_STOP = 660  # SIGSTOP a for 8.4 s
COORDINATOR = 165  # SIGKILL of it after 0.5 s, where a standby waits


@pytest.fixture
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        yield line


@pytest.fixture
def cluster(line: CommandLine) -> Iterator[Cluster]:
    with line.cluster("good.gguf", context_length=256, objective="throughput") as cluster:
        yield cluster


def is_undisturbed(cluster: Cluster) -> bool:
    """No worker is drained, and no process stopped."""
    drained = any(worker["drained"] for worker in cluster.status["workers"])
    return not drained and not any(process.status() == psutil.STATUS_STOPPED for process in cluster.processes)


def run_here(line: CommandLine, monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit code of a command in this process."""
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(line.state_dir))
    monkeypatch.setattr("sys.argv", ["llamaclust", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_faults_change_no_answer_and_leave_nothing(line: CommandLine, cluster: Cluster) -> None:
    before = cluster.answer()
    running = line.start("chaos", "--seed", str(DRAIN_AND_KILLS), "--minutes", "0.1", "--streams", "4")
    done = running.wait(120)
    assert done.code == 0, (done.out, done.err)
    first, second, *kinds = done.out.splitlines()
    assert re.fullmatch(rf"nothing lost, nothing changed: [1-9]\d* faults, seed {DRAIN_AND_KILLS}", first)
    assert re.fullmatch(r"[1-9]\d* answers, [1-9]\d+ tokens: 0 lost, 0 changed", second)
    assert any(re.match(r"SIGKILL of a worker: \d+; pause: median \d", kind) for kind in kinds)
    assert " s: drain a for 1.1 s\n" in done.err and " s: SIGKILL " in done.err
    assert " tok/s, " in done.err and " s left" in done.err
    assert is_undisturbed(cluster) and cluster.answer() == before


def test_ctrl_c_continues_stopped_workers_and_undrains(line: CommandLine, cluster: Cluster) -> None:
    pids = cluster.worker_pids
    running = line.start("chaos", "--seed", str(LONG_STOP), "--streams", "2")
    running.says("SIGSTOP a")
    eventually(lambda: psutil.Process(pids["a"]).status() == psutil.STATUS_STOPPED, 10.0, "a stopped worker")
    running.press_ctrl_c()
    done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err
    assert "1 faults" in done.out
    assert is_undisturbed(cluster) and cluster.worker_pids == pids
    eventually(lambda: cluster.status["requests"] == {"running": 0, "waiting": 0}, 10.0, "no requests")


def test_a_changed_answer_is_a_failure(
    line: CommandLine, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def change_one(rows: Iterable[RowResult]) -> Answer:
        nonlocal calls
        calls += 1
        answer = answer_rows(rows)
        if calls == 200:  # after the two undisturbed answers
            token, bits = answer[0]
            answer[0] = token, bytes([bits[0] ^ 1, *bits[1:]])
        return answer

    monkeypatch.setattr(load, "answer_rows", change_one)
    code = run_here(line, monkeypatch, "chaos", "--seed", "1", "--minutes", "0.05", "--streams", "2")
    shown = capsys.readouterr().out
    assert code == 1, shown
    assert shown.startswith("LOST OR CHANGED") and "0 lost, 1 changed" in shown


def test_clusters_that_serve_others_are_refused(
    line: CommandLine, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = cluster.status | {"requests": {"running": 2, "waiting": 1}}
    monkeypatch.setattr(ClusterApi, "status", lambda api: busy)
    assert run_here(line, monkeypatch, "chaos", "--minutes", "0.01") == 2
    assert "serves 3 requests of other clients; --yes" in capsys.readouterr().err


def test_the_coordinator_is_killed_where_a_standby_waits(line: CommandLine) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys: dict[str, Any] = {"listen": f"127.0.0.1:{port}", "context_length": 256}
    with line.cluster("good.gguf", **keys) as cluster:
        standby = line.start("up", line.cluster_file("good.gguf", **keys), "--standby")
        standby.says("this standby takes over")
        done = line.start("chaos", "--seed", str(COORDINATOR), "--minutes", "0.08", "--streams", "4").wait(120)
        assert done.code == 0, (done.out, done.err)
        assert "SIGKILL of the coordinator: 1; pause" in done.out
        assert cluster.command.process.wait(10) == -signal.SIGKILL
        record = json.loads((line.cluster_dir("tiny") / "cluster.json").read_text())
        assert record["pid"] == standby.process.pid
