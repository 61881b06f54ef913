"""Tests of `up`, `status`, `plan`, `logs`, `generate` and `down` on a tiny model."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from llamaclust.cli import terminal
from llamaclust.cli.cluster import logs
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import UsageError
from llamaclust.worker.devices.cores import physical_cores, read_cores
from support.clusters.command_line import Cluster, CommandLine, eventually, float32
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector
from support.network.loopback import free_port

WORKER_KEYS = {"name", "pid", "address", "device", "layers", "state", "memory_bytes", "busy", "tokens_per_s"}


@pytest.fixture(scope="module")
def cluster(line: CommandLine) -> Iterator[Cluster]:
    with line.cluster("good.gguf", context_length=256) as cluster:
        yield cluster


def test_status_json_has_the_keys_that_were_promised(line: CommandLine, cluster: Cluster) -> None:
    status = line.run("status", "--json").json
    assert (status["name"], status["api"], status["state"]) == ("tiny", cluster.api, "ready")
    assert status["pid"] == cluster.pid == cluster.command.process.pid
    assert status["model"] == "good"
    assert status["requests"] == {"running": 0, "waiting": 0}
    assert [worker["layers"] for worker in status["workers"]] == [[0, 2], [2, 4]]
    for worker, name in zip(status["workers"], "ab", strict=True):
        assert worker.keys() >= WORKER_KEYS
        assert (worker["name"], worker["state"], worker["device"]) == (name, "ready", "cpu")
        assert worker["memory_bytes"] > 0 and 0 <= worker["busy"] <= 1
    shown = line.run("status").out
    assert "tiny: ready" in shown and cluster.api in shown and "[0, 2)" in shown


def test_generate_finds_the_cluster_that_runs(line: CommandLine, cluster: Cluster) -> None:
    arguments = ("generate", "the first word", "-n", "12")
    found = line.run(*arguments, "--json").json
    assert (found["token_ids"], float32(found["logprobs"])) == cluster.answer()
    assert found["finish_reason"] == "length"
    assert found.keys() >= {"text", "prompt_token_ids", "timings"}
    measured = {"ttft_ms", "prefill_tok_s", "decode_tok_s", "drafted_tokens", "accepted_tokens"}
    assert found["timings"].keys() == measured
    assert line.run(*arguments, "--endpoint", cluster.api).out.rstrip("\n") == found["text"].rstrip("\n")
    alone = line.run(*arguments, "--json", "--model", "good.gguf").json
    assert [alone[key] for key in ("token_ids", "logprobs")] == [found[key] for key in ("token_ids", "logprobs")]


def test_logs_are_those_of_the_worker(line: CommandLine, cluster: Cluster) -> None:
    assert "layers [2, 4) are loaded" in line.run("logs", "b").out
    assert "layers [2, 4)" not in line.run("logs", "a").out
    done = line.run("logs", "c")
    assert done.code == 2 and "there are logs of: a, b" in done.error
    done = line.run("logs", "coordinator")
    assert done.code == 2 and "of the coordinator, which logs to its terminal unless" in done.error
    done = line.run("logs", "x" * 4000)
    assert done.code == 2 and "there are logs of: a, b" in done.error and len(done.error) < 300
    following = line.start("logs", "a", "-f")
    log = line.cluster_dir("tiny") / "logs" / "a.log"
    with log.open("a") as file:
        file.write("something new\n")
    eventually(lambda: "something new" in following.out.read_text(), 60.0, "the new line")
    following.press_ctrl_c()
    assert following.wait().code == 130 and "Traceback" not in following.err.read_text()


def test_logs_of_a_cluster_that_has_ended_are_those_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path))
    folder = ClusterDir(tmp_path / "brain")
    folder.create()
    with pytest.raises(UsageError, match="no log of a worker named 'w1': brain has ended, and workers on other"):
        logs("w1", cluster="brain")
    written, pieces = "".join(f"line {number}\n" for number in range(3000)), list[int]()
    folder.log_file("w1").write_text(written)
    monkeypatch.setattr("llamaclust.cli.cluster._PIECE", 1000)
    write = terminal.write

    def write_piece(text: str) -> None:
        pieces.append(len(text))
        write(text)

    monkeypatch.setattr(terminal, "write", write_piece)
    logs("w1", cluster="brain")
    assert capsys.readouterr().out == written and max(pieces) == 1000, "however long it is"


def test_a_second_cluster_of_the_name_is_refused_and_the_first_goes_on(line: CommandLine, cluster: Cluster) -> None:
    done = line.run("up", line.cluster_file("good.gguf"))
    assert done.code == 2
    assert f"'tiny' is already running (pid {cluster.pid}, {cluster.api})" in done.error
    again = line.run("up", line.cluster_file("good.gguf"), "--detach")
    assert again.code == 2 and again.error == done.error
    assert cluster.http.get("/health").status_code == 200


def test_a_port_in_use_is_refused_before_a_worker_starts(line: CommandLine, cluster: Cluster) -> None:
    port = cluster.api.rpartition(":")[2]
    done = line.run("up", line.cluster_file("good.gguf", "other"), "--port", port)
    assert done.code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in done.error
    assert not line.cluster_dir("other").joinpath("logs", "a.log").exists()


def test_what_is_left_on_disk_is_the_owners_alone(line: CommandLine, cluster: Cluster) -> None:
    """Checks the modes of all files but sockets, which their directory protects."""
    folder = line.cluster_dir("tiny")
    found = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert {"tiny", "run", "cluster.json", "a.log"} <= found.keys()
    assert not {name for name, mode in found.items() if mode & 0o077 and not name.endswith((".sock", ".sock.l"))}


def test_a_detached_cluster_from_start_to_stop(line: CommandLine) -> None:
    """Tests a cluster whose port and keys come from the command line and whose starting process has ended."""
    port = free_port()
    path = line.cluster_file("good.gguf", "apart")
    keys = ("context_length=128", "workers.b.threads=2", "workers.b.mlock=true", "workers.b.numa_node=0")
    done = line.run("up", path, "--detach", "--port", str(port), *chain(*(("--set", key) for key in keys)))
    assert done.code == 0 and done.out == "" and "apart is ready" in done.err and "Traceback" not in done.err
    try:
        status = line.run("status", "--cluster", "apart", "--json").json
        assert status["api"] == f"http://127.0.0.1:{port}"
        assert line.run("generate", "the", "-n", "3", "--cluster", "apart", "--json").json["token_ids"]
        refused = line.run("generate", "the " * 200, "--cluster", "apart")
        assert refused.code == 2 and "128" in refused.error
        assert "Traceback" not in line.run("logs", "coordinator", "--cluster", "apart").out
        log = line.run("logs", "b", "--cluster", "apart").out
        assert read_cores().on_node(0).threads_text(2) in log
        assert "MiB of packed weights are locked in RAM" in log
        assert "locked" not in line.run("logs", "a", "--cluster", "apart").out
    finally:
        stopped = line.run("down", "--cluster", "apart")
    assert stopped.code == 0 and stopped.err.endswith("apart is stopped\n")
    assert line.run("down", "--cluster", "apart").code == 2
    assert not [what for what in line.left_running().values() if "apart" in what]


def test_plan_json_says_what_a_start_would_do(line: CommandLine, cluster: Cluster) -> None:
    plan = line.run("plan", line.cluster_file("good.gguf", context_length=256), "--json").json
    stages = [(stage["worker"], stage["start"], stage["end"]) for stage in plan["stages"]]
    assert stages == [(worker["name"], *worker["layers"]) for worker in cluster.status["workers"]]
    assert plan["token_ms"] > 0 and plan["ttft_ms"] > 0 and plan["bottleneck"] in ("a", "b")
    assert plan["stages"][0]["weight_bytes"] > 0 and plan["context_length"] == 256
    by_hand = line.run(
        "plan", line.cluster_file("good.gguf"), "--set", "plan=[{worker: a, layers: [0, 4]}]", "--json"
    ).json
    assert [(stage["worker"], stage["end"]) for stage in by_hand["stages"]] == [("a", 4)]
    unknown = line.run("plan", line.cluster_file("good.gguf", "never", workers=[{"name": "a"}]))
    assert unknown.code == 0 and "? ms/token" in unknown.out and "?: not measured yet" in unknown.out
    assert f"  threads: a {physical_cores()}, for {read_cores()}\n" in unknown.out
    many = line.run("plan", line.cluster_file("good.gguf"), "--set", "workers.a.threads=999").out
    on_node = line.run("plan", line.cluster_file("good.gguf"), "--set", "workers.b.numa_node=0").out
    assert f"  threads: a 1, b 1 on NUMA node 0, for {read_cores()}" in on_node and "? ms/token" not in on_node
    assert f"  threads: a 999, b 1, for {read_cores()}; more threads than cores" in many


def test_plans_of_measured_workers_predict_gains_of_speculation(line: CommandLine, cluster: Cluster) -> None:
    file = line.cluster_file("good.gguf", context_length=256)
    assert "  speculation: " in line.run("plan", file).out
    (gain,) = line.run("plan", file, "--json", "--acceptance", "1", "--set", "speculative.max_window=3").json[
        "speculation"
    ]
    assert gain["acceptance"] == 1.0 and gain["drafted_tokens"] <= 3
    off = ("--set", "speculative=off")
    assert "speculation" not in line.run("plan", file, *off).out
    refused = line.run("plan", file, "--acceptance", "0.8", *off)
    assert refused.code == 2 and "the cluster drafts nothing, because `speculative` is off" in refused.error
    several = line.run("plan", file, "--json", "--acceptance", "90%", "--acceptance", "0.5").json["speculation"]
    assert [gain["acceptance"] for gain in several] == [0.9, 0.5]
    none = line.run("plan", file, "--acceptance", "101%")
    assert none.code == 2 and "101% is not an acceptance rate; give 0 to 1, for example 0.8 or 80%" in none.error


def test_plan_shows_kv_memory_on_disk(line: CommandLine) -> None:
    on_disk = ("--set", "workers.a.kv_disk=64MiB", "--set", "workers.b.kv_disk=1.5GiB")
    path = line.cluster_file("good.gguf", objective="throughput")
    assert "  KV memory on disk, at most: a 64 MiB, b 1536 MiB\n" in line.run("plan", path, *on_disk).out
    assert line.run("plan", path, *on_disk, "--json").json["kv_disk_bytes"] == {"a": 64 << 20, "b": 3 << 29}
    assert "on disk" not in line.run("plan", path).out


def test_plan_shows_the_coordinators_memory_for_images(line: CommandLine) -> None:
    folder = line.folder / "seeing"
    folder.mkdir()
    model = build_tiny_model(folder / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=1)
    told = r"\n  the coordinator takes up to (\d+) MiB of this machine for rows of images\n"
    assert not re.search(told, line.run("plan", model).out)
    build_projector(folder / "mmproj.gguf", "gemma3")
    found = line.run("plan", model).out
    rows = re.search(told, found)
    assert rows and 0 < int(rows[1]) <= 1024 and "MiB encoder" in found


def room_mib(said: str) -> int:
    (room,) = re.findall(r"a: .* of (\d+) MiB", said)
    return int(room)


def test_plan_knows_what_memory_leaves_to_a_worker_and_says_why(line: CommandLine) -> None:
    """Checks that a plan subtracts the memory of a worker's process, within 32 MiB of what a start measures."""
    worker = {"name": "a", "threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0, "memory": "300MiB"}
    path = line.cluster_file("good.gguf", "capped", workers=[worker])
    with line.cluster("good.gguf", "capped", workers=[worker]) as cluster:
        started = room_mib(cluster.command.err.read_text())
    planned = line.run("plan", path).out
    (own,) = re.findall(
        r"`memory` limits a whole worker: its process without layers takes about (\d+) MiB of that", planned
    )
    assert abs(room_mib(planned) - started) <= 32
    assert abs(300 - int(own) - room_mib(planned)) <= 1
    lacking = line.run("plan", path, "--set", "workers.a.memory=10MiB")
    assert lacking.code == 3 and "a 0;" in lacking.error and "its process without layers takes about" in lacking.error
    assert "its process without layers" not in line.run("plan", line.cluster_file("good.gguf")).out
