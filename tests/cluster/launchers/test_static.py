"""Tests of static workers: they join in any order over mutual TLS, give a single worker's bits, outlive
coordinators."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import signal
import stat
from pathlib import Path

import pytest

from llamaclust.cli.options import Gpus
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.core.errors import UsageError
from support.clusters.command_line import Cluster, CommandLine, eventually
from support.clusters.launched import Answers, answers, logs_of
from support.clusters.static_cluster import (
    join_port,
    logged,
    named,
    new_trust,
    ready,
    start_coordinator,
    start_worker,
    token_file,
)
from support.damaged_models import flip_middle
from support.network.loopback import free_port
from support.paths import ROOT


def test_three_workers_joined_before_and_after_give_the_single_workers_bits(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    new_trust(line)
    port = free_port()
    early = start_worker(line, port, "b")
    logged(early, "waiting for the coordinator")
    join = {"listen": f"127.0.0.1:{port}", "members": "127.0.0.1:0"}
    coordinator = start_coordinator(line, model, join=join)
    coordinator.says("still missing: worker a, worker c")
    assert "on a machine with an NVIDIA GPU, add --device cuda:0" in coordinator.err.read_text()
    late = [start_worker(line, port, name) for name in ("a", "c")]
    with ready(coordinator, line) as cluster:
        assert answers(cluster) == undisturbed
        status = cluster.status
        assert [worker["layers"] for worker in status["workers"]] == [[0, 2], [2, 4], [4, 6]]
        assert {worker["address"].rpartition(":")[0] for worker in status["workers"]} == {"127.0.0.1"}
        assert not status["insecure"]
        assert coordinator.err.read_text().count("all workers have joined") == 1
        log = logs_of(line, "b")
        assert "waiting for the coordinator" in log and "layers [2, 4) are loaded" in log
        assert log in early.err.read_text()
        assert line.run("down").code == 0
    for worker in (early, *late):
        assert worker.wait().code == 0
    secret = token_file(line).read_text().strip().rpartition(".")[2]
    told = [path.read_text() for path in line.folder.rglob("*") if path.suffix in (".err", ".out", ".log", ".json")]
    assert not [text for text in told if secret in text]


def test_a_count_takes_workers_of_any_name(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    coordinator = start_coordinator(line, model, workers=2, plan=[
        {"worker": "x", "layers": [0, 1]}, {"worker": "y", "layers": [1, 6]}
    ])  # fmt: skip
    port = join_port(coordinator)
    workers = [start_worker(line, port, name) for name in ("y", "x")]
    with ready(coordinator, line) as cluster:
        assert answers(cluster) == undisturbed
        assert [worker["name"] for worker in cluster.status["workers"]] == ["x", "y"]
    coordinator.press_ctrl_c()
    for worker in workers:
        assert worker.wait().code == 0


def test_workers_keep_their_weights_and_join_a_coordinator_that_comes_back(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    port = free_port()
    layers = {"a": [0, 2], "b": [2, 4], "c": [4, 6]}  # fixed: links of a busy machine could change the plan
    keys = {
        "join": {"listen": f"127.0.0.1:{port}", "members": "127.0.0.1:0"},
        "kv_memory": "8MiB",
        "plan": [{"worker": name, "layers": layers[name]} for name in layers],
        "timeouts": {"worker": "60s"},
    }
    coordinator = start_coordinator(line, model, **keys)
    join_port(coordinator)
    workers = [start_worker(line, port, name) for name in ("a", "b", "c")]
    with ready(coordinator, line) as cluster:
        assert answers(cluster) == undisturbed
        coordinator.kill()
    for worker in workers:
        logged(worker, "for 600 s at most, with weights kept")
    again = start_coordinator(line, model, **keys)
    with ready(again, line) as cluster:
        assert answers(cluster) == undisturbed
        assert line.run("down").code == 0
    for worker in workers:
        assert worker.wait().code == 0
        assert worker.err.read_text().count("its weights were kept") == 1
    assert ": loading" not in again.err.read_text() and again.err.read_text().count("MiB are loaded") == 3


def test_weights_of_a_damaged_file_are_not_kept_once_it_is_repaired(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    copy = Path(shutil.copyfile(model, line.folder / "copy.gguf"))
    port = free_port()
    keys = {
        "join": {"listen": f"127.0.0.1:{port}", "members": "127.0.0.1:0"},
        "kv_memory": "8MiB",
        "workers": named("a", "b"),
        "plan": [{"worker": "a", "layers": [0, 3]}, {"worker": "b", "layers": [3, 6]}],
    }
    flip_middle(copy, "blk.4.attn_output.weight")
    coordinator = start_coordinator(line, copy, **keys)
    join_port(coordinator)
    workers = [start_worker(line, port, name) for name in "ab"]
    with ready(coordinator, line) as cluster:
        assert answers(cluster) != undisturbed
        coordinator.kill()
    for worker in workers:
        logged(worker, "weights kept")
    flip_middle(copy, "blk.4.attn_output.weight")
    with ready(start_coordinator(line, copy, **keys), line) as cluster:
        assert answers(cluster) == undisturbed
        assert line.run("down").code == 0
    for worker in workers:
        assert worker.wait().code == 0
        assert "its weights were kept" not in worker.err.read_text()


def test_a_restarted_coordinator_knows_the_drained_workers_and_a_lost_records_term(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    keys = {"join": {"listen": f"127.0.0.1:{(port := free_port())}", "members": "127.0.0.1:0"}}
    coordinator = start_coordinator(line, model, **keys)
    join_port(coordinator)
    workers = [start_worker(line, port, name) for name in ("a", "b", "c")]
    with ready(coordinator, line) as cluster:
        assert cluster.status["epoch"] == "1.1"
        assert line.run("drain", "b").code == 0
        coordinator.kill()
    coordinator = start_coordinator(line, model, **keys)
    with ready(coordinator, line) as cluster:
        status = cluster.status
        assert [worker["drained"] for worker in status["workers"]] == [False, True, False]
        assert status["workers"][1]["layers"] is None and status["epoch"] == "2.1"
        assert answers(cluster) == undisturbed
        coordinator.kill()
    (line.cluster_dir("tiny") / "control.json").unlink()
    coordinator = start_coordinator(line, model, **keys)
    with ready(coordinator, line) as cluster:
        assert cluster.status["epoch"] == "3.1", "the workers have seen term 2"
        assert answers(cluster) == undisturbed
        assert line.run("down").code == 0
    for worker in workers:
        assert worker.wait().code == 0


def test_a_killed_worker_is_done_without_and_may_come_back(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    coordinator = start_coordinator(line, model)
    port = join_port(coordinator)
    workers = [start_worker(line, port, name) for name in ("a", "b", "c")]
    with ready(coordinator, line) as cluster:
        workers[2].kill()
        eventually(lambda: cluster.status["workers"][2]["state"] == "lost", 60.0, "the loss of worker c")
        lost = cluster.status["workers"][2]
        assert (lost["layers"], lost["device_layers"], lost["memory_bytes"]) == (None, [], 0)
        coordinator.says("worker c (layers [")
        coordinator.says(f"; look at {workers[2].err} on ")
        assert answers(cluster) == undisturbed
        start_worker(line, port, "c")
        eventually(lambda: cluster.status["workers"][2]["state"] != "lost", 60.0, "worker c's return")
        assert answers(cluster) == undisturbed
    coordinator.press_ctrl_c()


def layers(cluster: Cluster) -> list[list[int] | None]:
    return [worker["layers"] for worker in cluster.status["workers"]]


def test_a_start_goes_on_without_an_absent_worker_which_is_used_once_it_joins(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    coordinator = start_coordinator(line, model, timeouts={"worker": "10s"})
    port = join_port(coordinator)
    workers = [start_worker(line, port, name) for name in ("a", "b")]
    with ready(coordinator, line) as cluster:
        coordinator.says("the start continues with 2 of 3 workers, without worker c")
        assert layers(cluster) == [[0, 3], [3, 6]] and cluster.status["absent"] == ["worker c"]
        assert "absent: worker c" in line.run("status").out
        assert answers(cluster) == undisturbed
        workers.append(start_worker(line, port, "c"))
        eventually(lambda: layers(cluster) == [[0, 2], [2, 4], [4, 6]], 60.0, "layers on worker c")
        assert answers(cluster) == undisturbed and cluster.status["absent"] == []
    coordinator.press_ctrl_c()
    for worker in workers:
        assert worker.wait().code == 0


def test_a_worker_beyond_the_count_is_measured_and_used(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    coordinator = start_coordinator(line, model, workers=1)
    port = join_port(coordinator)
    workers = [start_worker(line, port, "x")]
    with ready(coordinator, line) as cluster:
        assert answers(cluster) == undisturbed
        workers.append(start_worker(line, port, "w"))
        eventually(lambda: layers(cluster) == [[0, 3], [3, 6]], 60.0, "layers on worker w")
        assert [worker["name"] for worker in cluster.status["workers"]] == ["w", "x"]
        assert cluster.status["speed"]["predicted"]["token_ms"], "both are measured"
        assert answers(cluster) == undisturbed
    coordinator.press_ctrl_c()
    for worker in workers:
        assert worker.wait().code == 0


def test_workers_end_when_the_coordinator_stays_away(line: CommandLine, model: Path) -> None:
    coordinator = start_coordinator(line, model, workers=named("a"), timeouts={"coordinator": "1s"})
    worker = start_worker(line, join_port(coordinator), "a")
    with ready(coordinator, line):
        coordinator.kill()
    done = worker.wait()
    assert done.code == 1 and "has not come back within 1 s" in done.err


def test_a_model_file_is_found_by_its_name_elsewhere_or_missed_in_one_line(
    line: CommandLine, model: Path, tmp_path: Path, undisturbed: Answers
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    here = tmp_path / "here" / model.name
    here.parent.mkdir()
    os.link(model, here)
    (there / model.name).write_bytes(model.read_bytes())
    coordinator = start_coordinator(line, here, workers=named("a"), timeouts={"coordinator": "1s"})
    port = join_port(coordinator)
    moved = here.rename(tmp_path / "moved.gguf")  # the coordinator has the file open
    worker = start_worker(line, port, "a", "--model-dir", there)
    with ready(coordinator, line) as cluster:
        assert answers(cluster) == undisturbed
    coordinator.press_ctrl_c()
    assert worker.wait().code == 0
    moved.rename(here)
    coordinator = start_coordinator(line, here, workers=named("a"))
    port = join_port(coordinator)
    here.rename(moved)
    start_worker(line, port, "a", "--model-dir", tmp_path)
    done = coordinator.wait()
    assert f"{here} and {tmp_path / model.name}: no such file on this machine" in done.err and done.code == 2


def test_an_insecure_cluster_is_loud(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    coordinator = start_coordinator(line, model, workers=named("a", "b"), insecure=True)
    port = join_port(coordinator)
    workers = [start_worker(line, port, name, "--insecure") for name in ("a", "b")]
    with ready(coordinator, line) as cluster:
        assert answers(cluster) == undisturbed
        assert cluster.status["insecure"]
        assert line.run("status").out.count("INSECURE") == 1
        assert coordinator.err.read_text().count("INSECURE") == 1
    coordinator.press_ctrl_c()
    for worker in workers:
        assert worker.wait().code == 0
        assert "insecure" in worker.err.read_text()
    assert not token_file(line).exists()


def test_a_worker_whose_security_differs_from_the_coordinators_says_so(line: CommandLine, model: Path) -> None:
    secure = start_coordinator(line, model)
    done = start_worker(line, port := join_port(secure), "a", "--insecure").wait()
    advice = "start the worker with --token-file instead of --insecure"
    assert f"error: the coordinator at 127.0.0.1:{port} requires TLS: {advice}" in done.err and done.code == 2
    insecure = start_coordinator(line, model, name="open", insecure=True)
    done = start_worker(line, port := join_port(insecure), "a", token=token_file(line)).wait()
    assert f"error: 127.0.0.1:{port} does not use TLS: it is not the join port" in done.err and done.code == 2


def test_what_the_authority_leaves_is_private(line: CommandLine, model: Path) -> None:
    coordinator = start_coordinator(line, model)
    join_port(coordinator)
    folder = token_file(line).parent
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {".trust": 0o700, "ca.key": 0o600, "ca.crt": 0o600, "token": 0o600}
    before = token_file(line).read_text()
    coordinator.process.send_signal(signal.SIGTERM)
    coordinator.wait()
    again = start_coordinator(line, model)
    join_port(again)
    assert token_file(line).read_text() == before
    eventually(lambda: str(token_file(line)) in again.err.read_text(), 60.0, "where the token is")


def test_a_worker_that_the_file_does_not_name_is_refused(line: CommandLine, model: Path) -> None:
    coordinator = start_coordinator(line, model)
    done = start_worker(line, join_port(coordinator), "stranger").wait()
    assert done.code == 2 and "the cluster file has no worker named stranger; it has a, b, c" in done.err
    logged(coordinator, "refused: enrolment of 127.0.0.1: worker stranger")


def test_up_gives_up_on_workers_that_do_not_come(line: CommandLine, model: Path) -> None:
    join = {"listen": "127.0.0.1:0", "members": "127.0.0.1:0", "wait": "1s"}
    done = start_coordinator(line, model, join=join).wait()
    assert done.code == 1 and "did not join within 1 s (`join.wait`): worker a, worker b" in done.err


@pytest.mark.parametrize("text", ["join: {wait: 5s}", "insecure: true", "timeouts: {coordinator: 60s}"])
def test_keys_of_static_clusters_are_refused_elsewhere(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\nworkers: [{{name: a}}]\n{text}\n")
    with pytest.raises(UsageError, match="is for `launcher: static`"):
        load_config(path)


BAD_OPTIONS = {
    ("--join", "nowhere:x"): "--join: 'nowhere:x' is not an address",
    ("--join", "h:1", "--name", "a/b"): "--name: 'a/b' is not a name",
    ("--join", "h:1", "--memory", "lots"): "--memory: 'lots' is not a size",
    ("--join", "h:1", "--listen", "h"): "--listen: 'h' is not an address",
    ("--join", "h:1", "--device", "tpu"): "--device: 'tpu' is not a device; give cpu, cuda:0",
    (
        "--join",
        "h:1",
        "--device",
        "cpu",
        "--device",
        "cuda:0",
    ): "--device: 'cpu' cannot be combined with GPUs",
    ("--join", "h:1", "--device", "[cuda:0, cuda]"): "list at most 16 GPUs, and each only once",
    ("--join", "h:1", "--device", "cuda", "--gpu-layers", "all"): "--gpu-layers: 'all' is not a number of layers",
    ("--join", "h:1", "--gpu-memory", "2GiB"): "--gpu-memory is for workers with a GPU",
    ("--join", "h:1", "--insecure", "--token-file", "f"): "--insecure and --token-file: choose one",
    ("--join", "h:1"): "--token-file: give the token's file, since there is no",
    (): "--join: give the address that `llamaclust up` prints, or set LLAMACLUST_JOIN",
    ("--join", "h:1", "--join", "elsewhere:x"): "--join: 'elsewhere:x' is not an address",
}


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=" ".join)
def test_mistakes_on_the_workers_command_line_are_named(line: CommandLine, options: tuple[str, ...]) -> None:
    done = line.run("worker", *options)
    assert BAD_OPTIONS[options] in done.error and done.code == 2


@pytest.mark.parametrize("given", [["[cuda:0, cuda:1]"], ["cuda:0", "cuda:1"], ["cuda:0,cuda:1"]])
def test_several_gpus_may_be_given_in_any_way(given: list[str]) -> None:
    assert Gpus(given, "auto", None).parsed == ("cuda:0,cuda:1", None, None)
    assert Gpus([], "auto", None).parsed[0] == "cpu"


def test_the_systemd_unit_starts_what_the_program_accepts(line: CommandLine) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(ROOT / "deploy" / "llamaclust-worker.service")
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/llamaclust")
    done = line.run(*arguments)
    assert done.code == 2 and done.err.startswith("error: token file /etc/llamaclust/join-token cannot be read")
    service = unit["Service"]
    assert service["DevicePolicy"] == "closed" and service["DeviceAllow"].startswith("char-nvidia*")
    assert (
        service["NoNewPrivileges"] == service["ProtectKernelModules"] == "yes" and not service["CapabilityBoundingSet"]
    )
    hides_gpus_or_stops_cuda = {"PrivateDevices", "MemoryDenyWriteExecute", "SystemCallFilter"}
    assert not hides_gpus_or_stops_cuda & set(service)
