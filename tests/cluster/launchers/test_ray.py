"""Tests of workers that Ray starts: they give a single worker's bits, return after losses, and leave nothing."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llamaclust.cluster.launchers.ray import RayLauncher
from llamaclust.cluster.launchers.ray_workers import resources
from llamaclust.cluster.launchers.restarts import RestartPolicy
from llamaclust.worker.settings import WorkerSettings
from support.clusters.command_line import Cluster, CommandLine, Running, eventually, is_there
from support.clusters.launched import Answers, answers, logs_of
from support.clusters.ray_nodes import left_in, ray_node
from support.clusters.static_cluster import named, ready, token_file
from support.network.box import Box, missing
from support.network.loopback import free_port

pytest.importorskip("ray", reason="Ray is not installed here: pip install 'llamaclust[ray]'")

from llamaclust.cluster.launchers import ray_actor
from llamaclust.cluster.launchers.ray_actor import WorkerActor

pytestmark = pytest.mark.alone

API = "127.0.0.1:8080"
SOON: dict[str, Any] = {
    f"RAY_health_check_{name}": value
    for name, value in {
        "initial_delay_ms": "500",
        "period_ms": "500",
        "timeout_ms": "1000",
        "failure_threshold": "3",
    }.items()
}
"""Settings with which Ray notices a lost node within seconds."""
NO_GROUP_OR_ACTOR: tuple[list[str], list[str]] = ([], [])


@pytest.fixture(autouse=True)
def _no_ray_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def workers(*names: str, **keys: Any) -> list[dict[str, Any]]:
    return [{**worker, "threads": 1, **keys} for worker in named(*names)]


def start(line: CommandLine, model: Path, before: tuple[str, ...] = (), **keys: Any) -> Running:
    join = {"listen": "0.0.0.0:0", "members": "0.0.0.0:0"}
    values = {"launcher": "ray", "join": join, "workers": workers("a", "b", "c"), "objective": "throughput"}
    return line.start("up", line.cluster_file(model, **{**values, **keys}), before=before)


def fixed_ports() -> dict[str, str]:
    return {key: f"127.0.0.1:{free_port()}" for key in ("listen", "members")}


def hosts(cluster: Cluster) -> set[str]:
    return {worker["address"].rpartition(":")[0] for worker in cluster.status["workers"]}


@pytest.mark.promise
def test_a_ray_cluster_of_its_own_gives_the_single_workers_bits_and_is_gone_afterwards(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    command = start(line, model, ray={"address": "none"})
    with ready(command, line) as cluster:
        assert answers(cluster) == undisturbed
        assert [worker["layers"] for worker in cluster.status["workers"]] == [[0, 2], [2, 4], [4, 6]]
        below = cluster.processes
        folder = next(Path(word) for one in below for word in temporary_folders(one))

        def joined() -> bool:  # in `ray logs`, which Ray writes some time later
            logs = [path.read_text() for path in folder.glob("session_latest/logs/worker-*.err")]
            return all(any(f"worker {name} is a member" in log for log in logs) for name in "abc")

        eventually(joined, 180.0, "all workers are members in Ray's logs")
        assert "layers [2, 4) are loaded" in logs_of(line, "b")
        secret = token_file(line).read_text().strip().rpartition(".")[2]
        told = [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
        assert not [text for text in (*told, *map(about, below)) if secret in text]
        before = cluster.worker_pids
        os.kill(before["b"], signal.SIGKILL)
        assert answers(cluster) == undisturbed
        eventually(lambda: cluster.worker_pids["b"] != before["b"] and present(cluster, "b"), 60.0, "worker b is back")
        assert "SIGKILL" in command.err.read_text()
        assert line.run("down").code == 0
    assert command.wait().code == 0
    assert not folder.exists() and not [one for one in below if is_there(one)]


def present(cluster: Cluster, name: str) -> bool:
    return any(one["name"] == name and one["state"] not in ("lost", "left") for one in cluster.status["workers"])


def temporary_folders(process: psutil.Process) -> list[str]:
    return re.findall(r"/\S*?/llamaclust-ray-\w+", about(process).partition("\n")[0])


def about(process: psutil.Process) -> str:
    """Returns the command line, and the environment in a second line, or nothing for a process that has ended."""
    try:
        return f"{' '.join(process.cmdline())}\n{process.environ()}"
    except psutil.NoSuchProcess:
        return ""


def test_two_nodes_on_hosts_of_their_own_one_of_which_is_lost(
    line: CommandLine, model: Path, undisturbed: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    auth: dict[str, Any] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}
    with Box(["a", "b"]) as box:
        one, other = box["a"], box["b"]
        head = f"{one.address}:6379"
        with (
            ray_node("--head", "--port=6379", address=one.address, before=one.prefix, **auth, **SOON),
            ray_node(f"--address={head}", address=other.address, before=other.prefix, **auth, **SOON) as raylet,
        ):
            monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 43)
            done = start(line, model, one.prefix, ray={"address": head}).wait()
            assert done.code == 2 and f"the Ray cluster at {head} refuses the token of this machine" in done.err
            for name, value in auth.items():
                monkeypatch.setenv(name, value)
            command = start(line, model, one.prefix, ray={"address": head}, listen=API)
            command.says("tiny is ready")
            cluster = Cluster(command, "tiny", f"http://{API}", command.process.pid)
            assert one.call(lambda: (answers(cluster), hosts(cluster))) == (undisturbed, {one.address, other.address})
            raylet.kill()
            assert one.call(lambda: answers(cluster)) == undisturbed
            all_there = lambda: hosts(cluster) == {one.address} and all(present(cluster, name) for name in "abc")  # noqa: E731
            one.call(lambda: eventually(all_there, 100.0, "all workers on the node that is left"))
            assert one.call(lambda: answers(cluster)) == undisturbed
            command.press_ctrl_c()
            assert command.wait().code == 0
            assert left_in(head, one.prefix) == NO_GROUP_OR_ACTOR


def test_what_cannot_be_placed_is_told_and_ctrl_c_leaves_nothing(line: CommandLine, model: Path) -> None:
    command = start(line, model, ray={"address": "none"}, workers=workers("a", memory="900TiB"))
    command.says("waiting for Ray to find room for a: 1 CPU, 921,600.0 GiB memory")
    below = psutil.Process(command.process.pid).children(recursive=True)
    assert len(below) > 2
    command.press_ctrl_c()
    assert command.wait().code == 130
    assert not [one for one in below if is_there(one)]


def test_a_ray_that_does_not_start_is_tried_again_and_leaves_no_process(
    line: CommandLine, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Uses `auto` on a machine outside any Ray cluster: Ray's folder, which would name one, is empty."""
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "0")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    command = start(line, model)
    command.says("Ray did not start, trying again (3 of 3): Ray at local: Timed out")
    below = psutil.Process(command.process.pid).children(recursive=True)
    starts = {folder for one in below if is_there(one) for folder in temporary_folders(one)}
    assert len(starts) <= 1, "processes of failed starts are left beside those of the third"
    done = command.wait()
    assert done.code == 1 and "error: Ray at local: Timed out" in done.err and "Traceback" not in done.err
    assert not [one for one in below if is_there(one)]


def test_the_start_after_one_that_failed_serves(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    command = start(line, model, ray={"address": "none"})
    process(command, "raylet").kill()
    with ready(command, line) as cluster:
        assert "Ray did not start, trying again (2 of 3)" in command.err.read_text()
        assert answers(cluster) == undisturbed
        assert line.run("down").code == 0
    assert command.wait().code == 0


def process(command: Running, name: str) -> psutil.Process:
    """Waits for a process of this name below the command."""
    found: list[psutil.Process] = []

    def there() -> bool:
        below = psutil.Process(command.process.pid).children(recursive=True)
        found[:] = [one for one in below if is_there(one) and one.name() == name]
        return bool(found)

    eventually(there, 120.0, f"a process {name}")
    return found[0]


def test_a_ray_cluster_without_authentication_is_used_only_where_that_is_allowed(
    line: CommandLine, model: Path, undisturbed: Answers
) -> None:
    port = free_port()
    head = f"127.0.0.1:{port}"
    with ray_node("--head", f"--port={port}", address="127.0.0.1", RAY_AUTH_MODE="disabled"):
        done = start(line, model, ray={"address": head}).wait()
        assert done.code == 2 and "requires no token" in done.err and "allow_unauthenticated: true" in done.err
        keys: dict[str, Any] = {
            "ray": {"address": head, "allow_unauthenticated": True},
            "join": fixed_ports(),
            "kv_memory": "8MiB",
        }
        command = start(line, model, **keys)
        with ready(command, line) as cluster:
            assert answers(cluster) == undisturbed
            before = cluster.worker_pids
            command.kill()
        assert left_in(head) == (["a", "b", "c"], ["llamaclust"])
        again = start(line, model, **keys)
        with ready(again, line) as cluster:
            assert answers(cluster) == undisturbed
            assert cluster.worker_pids == before, "its workers were taken back"
        again.press_ctrl_c()
        assert again.wait().code == 0
        assert left_in(head) == NO_GROUP_OR_ACTOR


def test_no_ray_at_an_address_is_told_at_once(line: CommandLine, model: Path) -> None:
    done = start(line, model, ray={"address": f"127.0.0.1:{free_port()}"}).wait()
    assert done.code == 1 and "no Ray cluster answers at " in done.err and "Traceback" not in done.err


def test_without_ray_the_way_to_install_it_is_told(
    line: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('there is none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = start(line, model).wait()
    assert done.code == 2 and "launcher ray needs Ray: pip install 'llamaclust[ray]'" in done.err


@pytest.mark.parametrize(("is_another", "kills"), [(False, 1), (True, 0)])
async def test_a_restart_kills_the_actor_that_ended_and_not_its_successor(is_another: bool, kills: int) -> None:
    """A successor that Ray has started itself is there after the pause."""
    killed: list[str] = []

    class Method:
        def __init__(self, answer: Callable[[], object]) -> None:
            self._answer = answer

        def remote(self) -> SimpleNamespace:
            answer: Future[object] = Future()
            answer.set_result(self._answer())
            return SimpleNamespace(future=lambda: answer)

    incarnations = iter(["first", "second" if is_another else "first"])
    ends = iter([("killed", "")])
    actor = SimpleNamespace(
        incarnation=Method(lambda: next(incarnations, "over")),
        ended=Method(lambda: next(ends)),
        is_over=Method(lambda: False),
    )
    launcher: Any = RayLauncher.__new__(RayLauncher)
    launcher._incarnations, launcher._last_errors, launcher._stopping = {}, {}, False
    launcher._restarts, launcher._thread = RestartPolicy(), ThreadPoolExecutor(1)
    launcher._workers = SimpleNamespace(restart=killed.append)
    with launcher._restarts.on(lambda name, why: None), pytest.raises(RuntimeError, match="StopIteration"):
        await launcher._follow("a", actor, lambda name, how: None)
    assert len(killed) == kills


def test_ray_reserves_what_the_file_says() -> None:
    assert resources(WorkerSettings(name="a", threads=3)) == {"CPU": 3}
    assert resources(WorkerSettings(name="a", device="cuda:0", threads=2, memory_bytes=1 << 30)) == {
        "CPU": 2,
        "memory": 1 << 30,
        "GPU": 1,
    }


@pytest.mark.parametrize("code", [0, 1, -9])
def test_an_actor_gives_the_coordinator_time_to_restart_it(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Ray cannot restart an actor whose placement group was removed."""
    done = list[str]()
    util = SimpleNamespace(
        list_named_actors=list,
        get_placement_group=lambda name: name,
        remove_placement_group=lambda group: done.append("removed"),
    )
    monkeypatch.setattr(ray_actor, "ray", SimpleNamespace(util=util))
    monkeypatch.setattr(ray_actor, "recent_error", lambda *_: "")
    monkeypatch.setattr(ray_actor, "time", SimpleNamespace(sleep=lambda s: done.append("waited")))
    monkeypatch.setattr(ray_actor, "os", SimpleNamespace(_exit=lambda status: done.append("ended")))
    monkeypatch.setattr(WorkerActor, "__init__", lambda self: None)
    actor: Any = WorkerActor()  # type: ignore[call-arg]
    actor._over, actor._is_again = threading.Event(), False
    actor._worker_ended(code)
    assert actor.is_over() and done[:2] == ["waited", "ended" if code < 0 else "removed"]
