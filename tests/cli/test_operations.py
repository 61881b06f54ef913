"""Tests of `status --watch`, `drain` and `undrain` on real workers of a tiny model."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from support.clusters.command_line import COMMAND, Cluster, CommandLine, Running, eventually


@pytest.fixture(scope="module")
def cluster(line: CommandLine) -> Iterator[Cluster]:
    with line.cluster("good.gguf", context_length=256, objective="throughput") as cluster:
        yield cluster


def printed(running: Running, lines: int) -> list[str]:
    eventually(lambda: running.out.read_text().count("\n") >= lines, 60.0, f"{lines} lines")
    return running.out.read_text().splitlines()


def test_status_shows_measured_beside_predicted(line: CommandLine, cluster: Cluster) -> None:
    assert cluster.answer(max_tokens=30, ignore_eos=True)
    status = line.run("status", "--json").json
    predicted, measured = status["speed"]["predicted"], status["speed"]["measured"]
    own = {"requests", "drafted_tokens", "accepted_tokens", "drafts"}
    assert measured.keys() - own == predicted.keys() - {"bottleneck"}
    assert predicted["token_ms"] > 0 and predicted["bottleneck"] in ("a", "b")
    assert measured["token_ms"] > 0 and measured["ttft_ms"] > 0 and measured["requests"] > 0
    assert (status["recoveries"], status["recovery_seconds"]) == (0, [])
    for worker in status["workers"]:
        assert worker["decode_ms"] > 0 and worker["predicted_decode_ms"] > 0
    assert cluster.status.keys() == status.keys()
    shown = line.run("status").out
    assert re.search(r"^measured:  \S+ ms/token, first token of a \d+-token prompt after", shown, re.MULTILINE)
    assert re.search(r"^predicted: \S+ ms/token, .* bottleneck: [ab]$", shown, re.MULTILINE)
    assert "\nobjective: throughput (8 requests at once, each 256 tokens of prompt, 128 of answer)\n" in shown
    assert re.search("^(not as a group .*: .* tok/s .*: |no group is possible: )", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines()[-3:])) < 100 and "MiB now  planned" in shown  # the table


def test_status_of_a_cluster_at_an_address(line: CommandLine, cluster: Cluster) -> None:
    at = line.run("status", "--endpoint", f"{cluster.api}/v1", "--json").json
    assert at["pid"] == cluster.pid
    both = line.run("status", "--endpoint", cluster.api, "--cluster", "tiny")
    assert both.code == 2 and "give one of them" in both.error
    none = line.run("status", "--endpoint", "http://127.0.0.1:9")
    assert none.code == 1 and "the cluster at http://127.0.0.1:9 does not answer" in none.error


def test_why_shows_where_the_time_of_a_request_went(line: CommandLine, cluster: Cluster) -> None:
    body = {"prompt": "the first word", "max_tokens": 20, "ignore_eos": True, "n": 2, "seed": 1}
    reply = cluster.http.post("/v1/completions", json=body).json()
    shown = line.run("why", reply["id"]).out.splitlines()
    name = reply["id"].removeprefix("cmpl-")[:8]
    heads = [text for text in shown if text.startswith(name)]
    assert len(heads) == 2 and all("20 generated, length" in text for text in heads)
    assert max(map(len, shown)) <= 80
    decode = shown.index(next(text for text in shown if text.startswith("decode, 19 tokens in 19 microbatches")))
    assert shown[decode].endswith("|") and "a: compute" in "".join(shown[decode:])
    listed = line.run("why").out
    assert listed.count(f"{name}: ") == 2
    records = line.run("why", name, "--json", "--endpoint", cluster.api).json["requests"]
    assert len(records) == 2
    for record in records:
        assert sum(phase["seconds"] for phase in record["phases"]) == pytest.approx(record["seconds"])
    unknown = line.run("why", "0000000000")
    assert unknown.code == 2 and "no request '0000000000' is open" in unknown.error


def test_watched_in_a_pipe_it_is_a_line_a_second(line: CommandLine, cluster: Cluster) -> None:
    watching = line.start("status", "--watch")
    lines = printed(watching, 2)
    watching.press_ctrl_c()
    done = watching.wait()
    assert done.code == 130 and done.err == ""
    assert all(re.match(r"\d\d:\d\d:\d\d tiny: ready; 0 running, 0 waiting; ", one) for one in lines)
    assert "busy a " in lines[0] and "\x1b" not in done.out


def test_watched_as_json_it_is_an_object_a_line(line: CommandLine, cluster: Cluster) -> None:
    watching = line.start("status", "--watch", "--json")
    assert [json.loads(one)["name"] for one in printed(watching, 2)][:2] == ["tiny", "tiny"]
    watching.press_ctrl_c()
    assert watching.wait().code == 130


def test_watched_on_a_terminal_it_stays_in_its_place(line: CommandLine, cluster: Cluster) -> None:
    """Checks that the view is at most as high as the terminal and that Ctrl-C restores the cursor."""
    shown, process = on_terminal(line, "status", "--watch", lines=4)
    eventually(lambda: b"".join(shown).count(b"tiny: ready") >= 3, 60.0, "three pictures")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    eventually(lambda: shown[-1] == b"", 60.0, "the end of what it wrote")
    text = b"".join(shown).decode()
    assert "Traceback" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "\x1b[1A" in text  # moves up over the previous view
    first = text.partition("\x1b[1A")[0]
    assert first.count("\n") <= 4


def on_terminal(line: CommandLine, *arguments: str, lines: int) -> tuple[list[bytes], subprocess.Popen[bytes]]:
    """Starts a command on a terminal of `lines` lines; returns its output in parts, the last one empty, and its
    process."""
    ours, its = pty.openpty()
    size = {"LINES": str(lines), "COLUMNS": "100", "TERM": "xterm-256color"}
    state = {"LLAMACLUST_STATE_DIR": str(line.state_dir)}
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=its, stdout=its, stderr=its, env={**os.environ, **size, **state}
    )
    os.close(its)
    shown: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                shown.append(data)
        except OSError:  # the other end is closed
            os.close(ours)
            shown.append(b"")

    threading.Thread(target=read, daemon=True).start()
    return shown, process


def test_layers_leave_a_drained_worker_and_come_back(line: CommandLine, cluster: Cluster) -> None:
    before = cluster.answer()
    done = line.run("drain", "a")
    assert (done.code, done.out) == (0, "") and "worker a is drained" in done.err
    a, b = cluster.status["workers"]
    assert (a["layers"], a["drained"], b["layers"]) == (None, True, [0, 4])
    assert re.search(r"^a .* joined, drained ", line.run("status").out, re.MULTILINE)
    assert cluster.answer() == before
    assert line.run("drain", "a").code == 0  # already drained
    last = line.run("drain", "b")
    assert last.code == 1 and "all other workers are drained or absent: b keeps" in last.error
    assert cluster.answer() == before
    done = line.run("undrain", "a")
    assert done.code == 0 and "worker a is used again" in done.err
    eventually(lambda: cluster.status["workers"][0]["layers"] == [0, 2], 60.0, "layers on a")
    shown = cluster.command.err.read_text()
    assert (
        "worker a is drained: it gets no layers until `undrain`" in shown and "worker a is no longer drained" in shown
    )
    assert cluster.answer() == before
    assert cluster.status["recoveries"] == 0


def test_who_is_not_there_cannot_be_drained(line: CommandLine, cluster: Cluster) -> None:
    for command in ("drain", "undrain"):
        done = line.run(command, "c")
        assert done.code == 2 and "no worker is named 'c'; the workers are a, b" in done.error
    done = line.run("drain", "a/../b" + "x" * 3000)
    assert done.code == 2 and len(done.error) < 4000
    assert line.run("drain").code == 2
    assert line.run("drain", "a", "--cluster", "none").code == 2


def test_a_watch_ends_with_its_cluster(line: CommandLine) -> None:
    with line.cluster("good.gguf", "short") as cluster:
        watching = line.start("status", "--watch", "--cluster", "short")
        printed(watching, 1)
        os.kill(cluster.pid, signal.SIGTERM)
        done = watching.wait()
    assert done.code == 0 and done.err == "short is stopped\n"
