"""Tests of the output of `up` in the foreground, and of the signals that end it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from support.clusters.command_line import COMMAND, CommandLine, eventually, is_there, paused
from support.clusters.static_cluster import start_coordinator
from support.hub.download_server import running_server

_SOON_S = 20.0  # well below the 30 s that requests get to finish
LEFT = "1 unanswered request is computed again at the next start"
LONG = {"prompt": "the", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(autouse=True)
def _each_ends_what_it_started(line: CommandLine) -> Iterator[None]:
    yield
    line.end_commands()


def nothing_left(line: CommandLine, name: str = "tiny") -> None:
    assert not line.left_running()
    folder = line.cluster_dir(name)
    assert not (folder / "cluster.json").exists() and not (folder / "run").exists()


def test_the_first_start_says_that_it_measures(line: CommandLine) -> None:
    workers = [{"name": "a", "threads": 1}, {"name": "b", "threads": 1}]
    with line.cluster("good.gguf", workers=workers) as cluster:
        said = cluster.command.err.read_text()
        for worker in "ab":
            assert said.index(f"measuring worker {worker}: memory bandwidth") < said.index("plan:")
        assert said.count("while the machine's other workers are idle") == 1, "of equal workers, one"
    with line.cluster("good.gguf", workers=workers) as cluster:
        assert "measuring" not in cluster.command.err.read_text()


def test_a_first_download_is_shown(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        server.does.files |= {"/m.gguf": b"GGUF" + bytes(1 << 20), "/page.gguf": b"<html>"}
        start = line.run("up", line.cluster_file("good.gguf", "web"), "--set", f"model={server.url}/m.gguf")
        assert "downloading: 1.0 of 1.0 MiB" in start.err and start.code == 2  # an incomplete model
        pull = line.run("model", "pull", f"{server.url}/page.gguf")
    assert pull.code == 2 and pull.out == ""
    assert pull.err.splitlines()[-1].startswith("error: ") and "not a GGUF file" in pull.err


def test_a_lost_worker_gets_a_line(line: CommandLine) -> None:
    with line.cluster("good.gguf") as cluster:
        os.kill(cluster.worker_pids["b"], signal.SIGKILL)
        cluster.command.says("worker b (layers [2, 4)) is lost: its process was killed by signal 9 (SIGKILL)")
        cluster.command.says("its log has no recent error\nnew plan: a [0, 4), 2 to load\n")
        cluster.command.says("recovered in ")
        cluster.command.says("worker b joined (pid ")
        cluster.command.press_ctrl_c()
        ended = cluster.command.wait()
    assert ended.code == 0 and ended.err.count("is lost") == 1 and "Traceback" not in ended.err
    assert ended.err.endswith("\ntiny is stopped\n")


def test_a_lost_worker_of_a_detached_cluster_is_in_its_log(line: CommandLine) -> None:
    assert line.run("up", line.cluster_file("good.gguf"), "--detach").code == 0
    try:
        pids = {worker["name"]: worker["pid"] for worker in line.run("status", "--json").json["workers"]}
        os.kill(pids["a"], signal.SIGKILL)
        log = line.cluster_dir("tiny") / "logs" / "coordinator.log"
        eventually(lambda: "worker a (layers [0, 2)) is lost" in log.read_text(), 60.0, "the loss in the log")
    finally:
        line.run("down")
    assert "Traceback" not in log.read_text()


def test_ctrl_c_says_what_it_waits_for_and_a_second_one_waits_no_more(line: CommandLine) -> None:
    with line.cluster("good.gguf", name="front") as cluster:
        b = cluster.worker_pids["b"]
        with cluster.http.stream("POST", "/v1/completions", json=LONG) as reply:
            parts = reply.iter_raw()  # a reference, since without it the connection would be closed
            assert next(parts)
            os.kill(b, signal.SIGSTOP)  # so that the request does not end earlier
            cluster.command.press_ctrl_c()
            cluster.command.says("stopping: 1 request is finished first, for 30 s at most; Ctrl-C again stops at once")
            cluster.command.press_ctrl_c()
            done = cluster.command.wait(_SOON_S)
    assert done.code == 0 and "Traceback" not in done.err
    assert done.err.endswith(f"front: {LEFT}\nfront is stopped\n")
    nothing_left(line, "front")


def test_down_ends_a_start_and_no_process_with_the_pid_of_a_killed_cluster(line: CommandLine) -> None:
    other = line.start("worker", "--join", "127.0.0.1:9", "--name", "z", "--insecure")
    folder = ClusterDir(line.cluster_dir("tiny"))
    folder.create()
    folder.write_record(ClusterRecord("tiny", other.process.pid, "http://127.0.0.1:1", "m"))
    waiting = start_coordinator(line, Path("good.gguf"))
    waiting.says("worker --join ")
    assert line.run("down").err.endswith("tiny is stopped\n")
    assert waiting.wait().code == 0 and other.process.poll() is None


def test_status_shows_a_start(line: CommandLine) -> None:
    """Checks that all forms of `status` show the known state of a start and succeed."""
    waiting = start_coordinator(line, Path("good.gguf"))
    waiting.says("worker --join ")
    state = line.run("status", "--json").json
    pid = waiting.process.pid
    assert (state["name"], state["state"], state["pid"], state["model"]) == ("tiny", "starting", pid, "good")
    assert (state["workers"], state["requests"]) == ([], {"running": 0, "waiting": 0})
    shown = f"tiny: starting, good at {state['api']} (pid {pid}); it waits for {state['reason']}\n"
    for options in ((), ("--cluster", "tiny"), ("--all",)):
        done = line.run("status", *options)
        assert (done.code, done.out) == (0, shown)
    assert line.run("status", "--all", "--json").json == {"clusters": [state]}
    there = line.run("status", "--endpoint", state["api"])
    assert (there.code, there.out) == (0, f"{state['api']}: starting; it waits for {state['reason']}\n")
    remote = line.run("status", "--endpoint", state["api"], "--json").json
    assert remote == {key: value for key, value in state.items() if key not in ("pid", "model")} | {
        "name": state["api"]
    }
    watching = line.start("status", "--watch")
    eventually(lambda: "tiny: starting" in watching.out.read_text(), 60, "a line of the start")
    assert line.run("down").err.endswith("tiny is stopped\n") and waiting.wait().code == 0
    assert watching.wait().code == 0


def test_down_says_what_it_waits_for_and_a_second_one_waits_no_more(line: CommandLine) -> None:
    with line.cluster("good.gguf") as cluster:
        b = cluster.worker_pids["b"]
        with cluster.http.stream("POST", "/v1/completions", json=LONG) as reply:
            parts = reply.iter_raw()
            assert next(parts)
            os.kill(b, signal.SIGSTOP)
            down = line.start("down")
            down.says("running requests are finished first; `llamaclust down` again stops at once")
            assert line.run("down", within_s=_SOON_S).code == 0
            done = down.wait(_SOON_S)
    assert done.code == 0 and done.err.endswith(f"\ntiny: {LEFT}\ntiny is stopped\n")
    nothing_left(line)


def test_a_closed_terminal_ends_it_as_sigterm_does(line: CommandLine) -> None:
    """Checks that requests are finished although shell and kernel may both send the signal."""
    with line.cluster("good.gguf", name="terminal") as cluster:  # no earlier test left a request of this name
        processes, b = cluster.processes, cluster.worker_pids["b"]
        with cluster.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 1500}) as reply:
            text = reply.iter_lines()
            assert next(text)
            with paused(b):
                for _ in range(2):
                    os.kill(cluster.pid, signal.SIGHUP)
                    cluster.command.says("stopping: 1 request")
            assert [part for part in text if part][-1] == "data: [DONE]"
        assert cluster.command.wait().code == 0
    assert not any(map(is_there, processes))
    nothing_left(line)


@pytest.mark.promise
def test_nohup_is_obeyed(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.clusters.command_line.COMMAND", ("nohup", *COMMAND))
    monkeypatch.setattr("support.clusters.command_line.fork_server", lambda program: None)  # nohup starts it
    with line.cluster("good.gguf") as cluster:
        os.kill(cluster.pid, signal.SIGHUP)
        os.kill(cluster.pid, signal.SIGHUP)
        assert cluster.answer()[0]
        os.kill(cluster.pid, signal.SIGTERM)
        assert cluster.command.wait().code == 0
    nothing_left(line)


def test_a_terminal_that_goes_away_leaves_nothing(line: CommandLine) -> None:
    """Closes the terminal, after which the kernel sends a signal and all writes fail."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *COMMAND, "up", line.cluster_file("good.gguf")],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**line._environment, "TERM": "xterm"},
    )
    os.close(secondary)
    try:
        seen = b""
        while b"is ready" not in seen:
            seen += os.read(primary, 1 << 16)
        os.close(primary)
        eventually(lambda: not line.left_running(), 60.0, "the end of every process")
    finally:
        process.kill()
        process.wait()
    nothing_left(line)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("-ngl", "99"),
            "-ngl: set `workers[].gpu_layers` in the cluster file instead: --set workers.0.gpu_layers=99",
        ),
        (
            ("--gpu-layers=9",),
            "--gpu-layers: set `workers[].gpu_layers` in the cluster file instead: --set workers.0.",
        ),
        (
            ("--device", "cuda:0"),
            "--device: set `workers[].device` in the cluster file instead: --set workers.0.device=",
        ),
    ],
)
def test_options_of_other_programs_are_told_how_they_are_written_here(
    line: CommandLine, words: tuple[str, ...], told: str
) -> None:
    for command in ("up", "plan"):
        done = line.run(command, *words)
        assert done.code == 2 and told in done.error


_SERVE = """
import os, sys, types
from pathlib import Path
from llamaclust.cli import up
serve = lambda *given, **more: print("grpc" in sys.modules, os.environ.get("GRPC_VERBOSITY"))
sys.modules["llamaclust.cluster.server.serve"] = types.SimpleNamespace(serve=serve)
up.run_cluster(Path(sys.argv[1]), [], None, lan=False, detach=False, standby=False, notify=None, ranked=False)
"""


def test_grpc_options_are_set_before_its_import(line: CommandLine) -> None:
    """Checks options that make hops faster and keep gRPC's messages off the terminal."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", _SERVE, str(line.cluster_file("good.gguf"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False ERROR", done.stderr


def test_a_worker_of_a_numa_node_that_is_not_there_is_refused(line: CommandLine) -> None:
    done = line.run("worker", "--join", "127.0.0.1:9", "--insecure", "--numa-node", "999")
    assert done.code == 2 and "numa_node 999: this process may not use the cores of this node" in done.error
