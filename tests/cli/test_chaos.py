"""Tests of `chaos` on real workers of a tiny model, and of the cluster's state afterwards."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from llamaclust.cli.main import main
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.tools.chaos import load, received
from llamaclust.tools.chaos.worker_faults import PRELOAD
from support.clusters.command_line import Cluster, CommandLine, command_line, eventually
from support.clusters.static_cluster import named
from support.models.hostile_models import tiny
from support.network.loopback import free_port

OF_WORKERS = ("--faults", "kill,stop,drain")
DRAIN_AND_KILLS = 2604  # drain a, SIGKILL b, SIGSTOP b, ...
LONG_STOP = 660  # SIGSTOP a for 8.4 s
COORDINATOR = 165  # SIGKILL of the coordinator after 0.5 s, while a standby waits
SILENCE_AND_FAILS = 399  # silence of a, failing steps of b within 1.5 s
FULL_DISK = 7312  # a full disk for 2.3 s, after a SIGSTOP of the coordinator


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
    """Returns whether no worker is drained and no process is stopped."""
    drained = any(worker["drained"] for worker in cluster.status["workers"])
    return not drained and not any(map(is_stopped, cluster.processes))


def is_stopped(process: psutil.Process) -> bool:
    """Returns whether a process is stopped; one that has just ended is not."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def run_here(line: CommandLine, monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Runs a command in this process and returns its exit code."""
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(line.state_dir))
    monkeypatch.setattr("sys.argv", ["llamaclust", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_faults_change_no_answer_and_leave_nothing(line: CommandLine, cluster: Cluster) -> None:
    before = cluster.answer()
    running = line.start("chaos", *OF_WORKERS, "--seed", str(DRAIN_AND_KILLS), "--minutes", "0.1", "--streams", "4")
    done = running.wait(120)
    assert done.code == 0, (done.out, done.err)
    first, second, *kinds = done.out.splitlines()
    assert re.fullmatch(rf"nothing lost, nothing changed: [1-9]\d* faults?, seed {DRAIN_AND_KILLS}", first)
    assert re.fullmatch(r"[1-9]\d* answers?, [1-9]\d+ tokens: 0 lost, 0 changed", second)
    assert any(re.match(r"SIGKILL of a worker: \d+; pause: median \d", kind) for kind in kinds)
    assert " s: drain a for 1.1 s\n" in done.err and " s: SIGKILL " in done.err
    assert " tok/s, " in done.err and " s left" in done.err
    assert is_undisturbed(cluster) and cluster.answer() == before


def test_ctrl_c_continues_stopped_workers_and_undrains(line: CommandLine, cluster: Cluster) -> None:
    pids = cluster.worker_pids
    running = line.start("chaos", *OF_WORKERS, "--seed", str(LONG_STOP), "--streams", "2")
    running.says("SIGSTOP a")
    eventually(lambda: psutil.Process(pids["a"]).status() == psutil.STATUS_STOPPED, 60.0, "a stopped worker")
    running.press_ctrl_c()
    done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err
    assert "1 fault, seed" in done.out
    assert is_undisturbed(cluster) and cluster.worker_pids == pids
    eventually(lambda: cluster.status["requests"] == {"running": 0, "waiting": 0}, 60.0, "no requests")


def test_a_changed_answer_is_a_failure(
    line: CommandLine, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, bits, to_change = load.Streams.undisturbed, received._bits, 0

    async def then_change(streams: load.Streams, count: int) -> None:
        nonlocal to_change
        await undisturbed(streams, count)
        to_change = 1

    def change_one(logprob: float, top: Any) -> bytes:
        nonlocal to_change
        found = bits(logprob, top)
        if to_change:
            to_change -= 1
            return bytes([found[0] ^ 1, *found[1:]])
        return found

    monkeypatch.setattr(load.Streams, "undisturbed", then_change)
    monkeypatch.setattr(received, "_bits", change_one)
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
    assert "serves 3 requests of other clients; add --yes" in capsys.readouterr().err


def file_limit(pid: int) -> int:
    return resource.prlimit(pid, resource.RLIMIT_FSIZE)[0]


def is_journalled(cluster: Cluster) -> bool:
    """Sends a request and returns whether the journal can be written again."""
    cluster.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": True}).raise_for_status()
    return "requests.journal: can be written again" in cluster.command.err.read_text()


def test_a_full_disk_and_a_stop_of_the_coordinator(line: CommandLine, cluster: Cluster) -> None:
    """Checks that requests go on without a journal and that all processes can write afterwards, even a new worker."""
    limits = [file_limit(pid) for pid in (cluster.pid, *cluster.worker_pids.values())]
    words = ("--faults", "coordinator-stop,disk-full", "--seed", str(FULL_DISK), "--minutes", "0.1", "--streams", "4")
    running = line.start("chaos", *words)
    running.says("full disk tiny for")
    eventually(lambda: file_limit(cluster.pid) == 0, 60.0, "a full disk")
    psutil.Process(cluster.worker_pids["a"]).kill()
    done = running.wait(120)
    assert done.code == 0, (done.out, done.err)
    assert "SIGSTOP of the coordinator: 1; pause" in done.out and "full disk of the coordinator: 1" in done.out
    eventually(lambda: is_journalled(cluster), 60.0, "a journal")
    eventually(lambda: cluster.status["state"] == "ready" and len(cluster.worker_pids) == 2, 60.0, "two workers")
    assert [file_limit(pid) for pid in (cluster.pid, *cluster.worker_pids.values())] == limits
    assert is_undisturbed(cluster)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ("coordinator-kill", "tiny has no standby (`llamaclust up FILE --standby`)"),
        ("kill,clock", "unknown kind 'clock'; choose from kill, stop, drain, coordinator-kill, coordinator-stop"),
    ],
)
def test_faults_that_cannot_be_are_refused(line: CommandLine, cluster: Cluster, kinds: str, words: str) -> None:
    assert words in line.run("chaos", "--faults", kinds, "--minutes", "0.01").error


def test_the_coordinator_is_killed_where_a_standby_waits(line: CommandLine) -> None:
    keys: dict[str, Any] = {"listen": f"127.0.0.1:{free_port()}", "context_length": 256}
    with line.cluster("good.gguf", **keys) as cluster:
        standby = line.start("up", line.cluster_file("good.gguf", **keys), "--standby")
        standby.says("this standby takes over")
        eventually(lambda: ClusterDir(line.cluster_dir("tiny")).has_standby, 60.0, "a standby")
        words = ("--faults", "kill,stop,drain,coordinator-kill", "--seed", str(COORDINATOR), "--minutes", "0.08")
        done = line.start("chaos", *words, "--streams", "4").wait(120)
        assert done.code == 0, (done.out, done.err)
        assert "SIGKILL of the coordinator: 1; pause" in done.out
        assert cluster.command.process.wait(60) == -signal.SIGKILL
        record = json.loads((line.cluster_dir("tiny") / "cluster.json").read_text())
        assert record["pid"] == standby.process.pid


def test_faults_within_workers_change_no_answer(line: CommandLine) -> None:
    """Uses faults that end by themselves; requests go on while a failing worker is quarantined."""
    line.set_variables(PYTHONPATH=os.pathsep.join((str(PRELOAD), *filter(None, sys.path))))
    workers = named("a", "b", "c")
    with line.cluster("good.gguf", context_length=256, objective="throughput", workers=workers) as cluster:
        before = cluster.answer()
        words = ("--faults", "fails,mute", "--seed", str(SILENCE_AND_FAILS), "--minutes", "0.15")
        done = line.start("chaos", *words).wait(150)
        assert done.code == 0, (done.out, done.err)
        assert done.out.startswith("nothing lost, nothing changed: "), done.out
        for kind in ("failing steps", "silence"):
            assert re.search(rf"^{kind} of a worker: [1-9]", done.out, re.MULTILINE), (done.out, done.err)
        assert cluster.answer() == before


def test_faults_within_workers_need_workers_that_have_them(line: CommandLine, cluster: Cluster) -> None:
    done = line.run("chaos", "--faults", "kill,mute")
    assert f"started with PYTHONPATH={PRELOAD}" in done.error and done.code == 2
