"""Tests of signals and lost processes, end to end: exit statuses, errors with the lost worker and the cause, and no
orphans."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from support.clusters.command_line import Cluster, CommandLine, command_line, eventually, is_there, paused
from support.clusters.faults.worker_program import run_in_workers
from support.models.hostile_models import slow_to_load, tiny

_SOON_S = 20.0  # Well below the 30 s that requests have to finish.
COMPLETIONS = "/v1/completions"
LONG = {"prompt": "the", "max_tokens": 2000, "ignore_eos": True, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        slow_to_load(line.folder / "slow.gguf")
        yield line


@pytest.fixture(autouse=True)
def _each_ends_what_it_started(line: CommandLine) -> Iterator[None]:
    yield
    line.end_commands()


def events(reply: httpx.Response) -> Iterator[Any]:
    """Yields the data of a stream's events. The last one is [DONE] if the stream succeeds."""
    for text in reply.iter_lines():
        if text.startswith("data: "):
            data = text.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def nothing_left(line: CommandLine, name: str = "tiny") -> None:
    eventually(lambda: not line.left_running(), 60.0, "the end of every process")
    folder = line.cluster_dir(name)
    assert not (folder / "cluster.json").exists() and not (folder / "run").exists()


def test_a_killed_worker_is_a_pause_for_its_requests_and_the_cluster_says_so(line: CommandLine) -> None:
    generation = LONG | {"max_tokens": 1900, "seed": 7}

    def text(stream: Iterator[Any]) -> str:
        return "".join(event["choices"][0]["text"] for event in stream if event != "[DONE]")

    with line.cluster("good.gguf") as cluster:
        b = cluster.worker_pids["b"]
        with cluster.http.stream("POST", COMPLETIONS, json=generation) as reply:
            undisturbed = text(events(reply))
        with cluster.http.stream("POST", COMPLETIONS, json=generation) as reply:
            stream = events(reply)
            first = text(iter([next(stream)]))
            os.kill(b, signal.SIGKILL)
            assert first + text(stream) == undisturbed
        assert cluster.metric("llamaclust_recovery_seconds_count") == 1
        assert cluster.http.get("/health").json() == {"status": "ok"}
        eventually(lambda: cluster.status["workers"][1]["state"] == "ready", 60.0, "worker b with layers again")
        assert cluster.status["recoveries"] == 1 and cluster.status["reason"] is None
        assert line.run("down").code == 0
        ended = cluster.command.wait()
        assert ended.code == 0 and "Traceback" not in ended.err
        how = r"its (process was killed by signal 9|connection (broke|closed))"  # Either may be noticed first.
        assert re.search(rf"worker b \(layers \[2, 4\)\) is lost: {how}", ended.err)
        assert "; its log has no recent error; 1 request waits\n" in ended.err
    nothing_left(line)


def test_no_process_outlives_a_coordinator_that_was_killed(line: CommandLine) -> None:
    with line.cluster("good.gguf") as cluster:
        assert cluster.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        processes = cluster.processes
        assert len(processes) == 3  # One of them renders templates.
        with cluster.http.stream("POST", COMPLETIONS, json=LONG) as reply:
            assert next(events(reply))
            os.kill(cluster.pid, signal.SIGKILL)
            eventually(lambda: not any(map(is_there, processes)), 60.0, "the end of all processes")
    assert line.run("status").code == 2


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_requests_finish_and_ends_with_0(line: CommandLine, how: str) -> None:
    """The first case starts in the folder of a killed cluster with the same name."""
    with line.cluster("good.gguf") as cluster:
        assert cluster.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        processes, b = cluster.processes, cluster.worker_pids["b"]
        with ExitStack() as pause:
            pause.enter_context(paused(b))  # The request must not finish before the check.
            with cluster.http.stream("POST", COMPLETIONS, json={**LONG, "max_tokens": 300}) as reply:
                end(cluster, how)
                eventually(lambda: cluster.http.get("/health").status_code == 503, 60.0, "draining")
                pause.close()
                assert list(events(reply))[-1] == "[DONE]"
        done = cluster.command.wait()
    assert done.code == 0 and "Traceback" not in done.err
    assert len(processes) == 3 and not any(map(is_there, processes))
    nothing_left(line)


def end(cluster: Cluster, how: str) -> None:
    if how == "Ctrl-C":
        cluster.command.press_ctrl_c()
    else:
        os.kill(cluster.pid, signal.SIGTERM)


def test_a_second_signal_ends_requests_too(line: CommandLine) -> None:
    with line.cluster("good.gguf") as cluster:
        b = cluster.worker_pids["b"]
        os.kill(b, signal.SIGSTOP)  # The request must not finish before the second signal.
        with cluster.http.stream("POST", COMPLETIONS, json=LONG) as reply:
            end(cluster, "Ctrl-C")
            eventually(lambda: cluster.http.get("/health").status_code == 503, 60.0, "draining")
            end(cluster, "Ctrl-C")
            *_, last = events(reply)
            assert "stopping" in last["error"]["message"]
        done = cluster.command.wait(_SOON_S)
    assert done.code == 0 and "Traceback" not in done.err
    nothing_left(line)


def test_requests_that_no_worker_has_seen_are_told_that_the_cluster_stops(line: CommandLine) -> None:
    """One request's body is incomplete at the first signal. Another one's chat is being rendered at the second
    signal."""
    slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    model = tiny(line.folder / "slow_chats.gguf", extra={"tokenizer.chat_template": slow})
    with line.cluster(model) as cluster, ThreadPoolExecutor(1) as pool:
        chat = pool.submit(cluster.http.post, "/v1/chat/completions", json=CHAT)
        eventually(lambda: len(cluster.processes) == 3, 60.0, "the process that renders")
        host, _, port = cluster.api.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10.0) as half:
            half.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99\r\n\r\n{{".encode())
            assert cluster.http.get("/health").status_code == 200  # This request comes after the incomplete one.
            end(cluster, "SIGTERM")
            with half.makefile("rb") as reply:
                text = reply.read()
        assert text.startswith(b"HTTP/1.1 503 ") and b"the cluster is stopping" in text
        assert not chat.done()
        end(cluster, "SIGTERM")
        told = chat.result(_SOON_S)
        assert told.status_code == 503 and told.json()["error"]["code"] == "cluster_stopping"
        done = cluster.command.wait(_SOON_S)
    assert done.code == 0 and "Traceback" not in done.err
    nothing_left(line)


def test_ctrl_c_while_weights_load_ends_everything(line: CommandLine) -> None:
    running = line.start("up", line.cluster_file("slow.gguf", context_length=64, max_sequences=2))
    running.says("plan:")
    running.press_ctrl_c()
    done = running.wait()
    assert "is ready" not in done.err and "Traceback" not in done.err
    assert done.code == 130 and done.err.endswith(" is stopped\n")
    nothing_left(line)


def test_ctrl_c_while_workers_start_ends_them_even_if_they_hang(line: CommandLine) -> None:
    running = line.start("up", line.cluster_file("good.gguf"))
    for worker in running.workers(2).values():
        worker.suspend()
    running.press_ctrl_c()
    done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err
    nothing_left(line)


def test_a_worker_that_dies_before_it_joins_is_an_error_with_its_name(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_workers(monkeypatch, line.folder, "import signal\nsignal.pause()", "b")
    running = line.start("up", line.cluster_file("good.gguf"))
    running.workers(2)["b"].kill()
    done = running.wait()
    assert done.code == 1 and "worker b did not start" in done.error and "SIGKILL" in done.error
    nothing_left(line)


def test_a_detached_start_that_is_interrupted_leaves_nothing(line: CommandLine) -> None:
    """Ctrl-C ends only the foreground command, so it must also stop the cluster."""
    running = line.start("up", line.cluster_file("slow.gguf", "apart", context_length=64, max_sequences=2), "--detach")
    running.says("plan:")
    running.press_ctrl_c()
    done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err
    nothing_left(line, "apart")


def test_a_worker_that_hangs_is_replaced(line: CommandLine) -> None:
    """A stopped worker counts as lost after `timeouts.worker`, or earlier if a step waits for it too long."""
    with line.cluster("good.gguf", timeouts={"worker": "10s"}) as cluster, ThreadPoolExecutor(1) as pool:
        psutil.Process(cluster.worker_pids["a"]).suspend()
        reply = pool.submit(cluster.http.post, COMPLETIONS, json={"prompt": "a"}, timeout=60.0).result(60.0)
        assert reply.status_code == 200
        cluster.command.says("worker a (layers [0, 2)) is lost: ")
        cluster.command.says("worker a joined (pid ")
        assert line.run("down").code == 0
    nothing_left(line)


def test_a_cluster_whose_state_directory_is_deleted_is_found_again(line: CommandLine) -> None:
    with line.cluster("good.gguf") as cluster:
        record = line.cluster_dir("tiny") / "cluster.json"
        # The folder is renamed first, because the coordinator writes into it.
        shutil.rmtree(line.state_dir.rename(line.folder / "deleted"))
        eventually(record.exists, 60.0, "the record again")
        assert line.run("status", "--json").json["state"] == "ready"
        assert cluster.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200
        second = line.run("up", line.folder / "tiny.yaml")
        assert second.code == 2 and "already running" in second.err
        assert line.run("down").code == 0
        assert cluster.command.wait().code == 0
    nothing_left(line)
