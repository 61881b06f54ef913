"""Tests of local workers: they end with their coordinator however it ends, and do not show secrets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llamaclust.cluster.launchers import local
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.restarts import RestartLimits
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.launchers.worker_process import describe_exit, worker_command
from llamaclust.core.errors import UsageError
from llamaclust.wire.rpc.server import Server
from llamaclust.worker.settings import WorkerSettings
from support.clusters.real_cluster import losses, real_cluster

_COORDINATOR = """
import asyncio, sys
from pathlib import Path
from support.clusters.real_cluster import losses, real_cluster

async def main():
    async with real_cluster(Path(sys.argv[1]), 2, device="reference") as cluster:
        print(*cluster.pids.values(), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Yields a coordinator in a process of its own, and its two workers."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _COORDINATOR, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        yield process, workers
        process.kill()


def _wait_until_gone(workers: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(workers, timeout=60.0)  # two seconds on an idle machine
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_worker_outlives_its_coordinator(
    coordinator: tuple[subprocess.Popen[str], list[psutil.Process]], number: signal.Signals
) -> None:
    process, workers = coordinator
    process.send_signal(number)
    _wait_until_gone(workers)


def test_a_worker_that_cannot_react_is_killed_too(
    coordinator: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    process, workers = coordinator
    for worker in workers:
        worker.suspend()
    process.kill()
    _wait_until_gone(workers)


@pytest.mark.parametrize("ends", ["at once", "late", "never"])
async def test_the_end_of_a_lost_worker_is_waited_for(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A busy event loop, or a system that frees memory, delays the end; a worker that does not end is logged."""
    kill, loop = local._kill, asyncio.get_running_loop()
    pauses_s = {"at once": 0.0, "late": 2 * local._GRACE_S}
    async with real_cluster(tmp_path, 2, device="reference") as cluster:
        worker = psutil.Process(cluster.pids["a"])
        with monkeypatch.context() as patched:
            if ends == "never":
                patched.setattr(local, "_kill", lambda *_: None)
                patched.setattr(local, "_KILLED_S", 0.01)
            else:
                patched.setattr(local, "_kill", lambda *what: loop.call_later(pauses_s[ends], kill, *what))
            await cluster.launcher.end("a")
        assert worker.is_running() == (ends == "never")
    told = [record.getMessage() for record in caplog.records if record.name == local.__name__]
    assert told == ([f"worker a (pid {worker.pid}) has not ended 0.01 s after SIGKILL"] if ends == "never" else [])


async def test_a_worker_whose_log_cannot_be_opened_is_given_up_by_name(tmp_path: Path) -> None:
    async def killed() -> int:
        return -9

    ends, given_up = list[str](), list[tuple[str, str]]()
    (tmp_path / "a.log").mkdir()
    with run_directory(tmp_path) as run:
        launcher = LocalLauncher(run, tmp_path)
        launcher._restarts.limits = RestartLimits(most=2, first_s=0.001)
        launcher._processes["a"] = SimpleNamespace(wait=killed)  # type: ignore[assignment]
        with launcher.restarting(lambda name, why: given_up.append((name, why))):
            async with asyncio.timeout(60):
                await launcher._watch(WorkerSettings(name="a"), lambda name, how: ends.append(name))
    reason = f"it cannot be started: {tmp_path}/a.log is not a regular file, but must be a log file; remove it"
    assert given_up == [("a", f"{reason}; it was restarted 2 times within 60 s")]
    assert ends == ["a"]


async def test_stopping_kills_what_does_not_end_by_itself(tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 2, device="reference") as cluster:
        workers = [psutil.Process(pid) for pid in cluster.pids.values()]
        workers[0].suspend()
        begun = time.monotonic()
        await cluster.launcher.stop()
        assert time.monotonic() - begun < 10.0  # a second on an idle machine
        assert not any(worker.is_running() for worker in workers)


def test_the_registry_ends_its_workers_and_calls_none_lost(tmp_path: Path) -> None:
    lost: list[str] = []

    async def run() -> list[psutil.Process]:
        nonlocal lost
        async with real_cluster(tmp_path, 2, device="reference") as cluster:
            lost = losses(cluster.registry)
            workers = [psutil.Process(pid) for pid in cluster.pids.values()]
            await cluster.registry.__aexit__()
            psutil.wait_procs(workers, timeout=60.0)  # two seconds on an idle machine
            return workers

    assert not any(worker.is_running() for worker in asyncio.run(run()))
    assert lost == []
    assert "ends: the cluster was stopped" in (tmp_path / "logs" / "a.log").read_text()


def test_secrets_are_neither_in_the_environment_nor_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET_KEY", "hush")

    async def run() -> None:
        async with real_cluster(tmp_path, 1, device="reference") as cluster:
            worker = psutil.Process(cluster.pids["a"])
            assert "CLOUD_SECRET_KEY" not in worker.environ()
            shown = " ".join((*worker.cmdline(), *worker.environ().values()))
            assert cluster.run.token.value not in shown
            assert os.getsid(worker.pid) == worker.pid
            assert cluster.run.path.stat().st_mode & 0o777 == 0o700
            log = tmp_path / "logs" / "a.log"
            assert log.stat().st_mode & 0o777 == 0o600
            assert cluster.run.token.value not in log.read_text()

    asyncio.run(run())
    assert not (tmp_path / "run").exists()


def test_a_worker_of_no_launcher_ends_when_its_coordinator_is_gone(tmp_path: Path) -> None:
    """The worker has no parent to end with, and ends when the control stream ends."""

    async def run() -> tuple[int | None, str]:
        async with real_cluster(tmp_path, 1, device="reference") as cluster:
            join, token = cluster.registry.address, cluster.run.token.value
            settings = WorkerSettings(name="x", device="reference", join=join, token=token)
            process = await asyncio.create_subprocess_exec(
                *worker_command(settings), stdin=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert process.stdin is not None
            process.stdin.write(settings.to_json().encode())
            process.stdin.close()
            await cluster.registry.wait_for({"x"}, 30.0)
            server = cluster.registry._server
            assert isinstance(server, Server)
            await server.stop(0.0)
            async with asyncio.timeout(60):
                _, log = await process.communicate()
            return process.returncode, log.decode()

    code, log = asyncio.run(run())
    assert code == 1
    assert "the coordinator is gone" in log.splitlines()[-1]


def without_coordinator(folder: Path, **more: Any) -> WorkerSettings:
    return WorkerSettings(name="x", join=f"unix:{folder}/absent.sock", token="t" * 40, **more)


def ended(settings: WorkerSettings) -> subprocess.CompletedProcess[str]:
    """Runs a worker process that ends by itself."""
    command, text = worker_command(settings), settings.to_json()
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)


def test_a_worker_that_finds_no_coordinator_gives_up_by_name(tmp_path: Path) -> None:
    done = ended(without_coordinator(tmp_path, device="reference", join_s=0.3))
    assert done.returncode == 1
    assert "joining the coordinator at unix:" in done.stderr.splitlines()[-1]
    assert "took longer than 0.3 s" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_worker_whose_parent_has_gone_before_it_looks_does_not_start(tmp_path: Path) -> None:
    done = ended(without_coordinator(tmp_path, parent_pid=1))
    assert done.returncode == 1
    assert "the process that started this worker (pid 1) has ended" in done.stderr


def test_a_run_directory_too_deep_for_sockets_moves(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    with run_directory(deep) as run:
        path = run.path
        assert not path.is_relative_to(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o700
        assert len(run.worker(1000).removeprefix("unix:")) <= 107
        with run_directory(deep) as after_a_kill:
            assert not path.exists()
            assert after_a_kill.path.exists()
    assert not path.exists()
    assert list(deep.iterdir()) == []
    with run_directory(tmp_path / "x") as run:
        assert run.path == tmp_path / "x" / "run"
        (run.path / "left.sock").touch()
        with run_directory(tmp_path / "x") as after_a_kill:
            assert not (after_a_kill.path / "left.sock").exists()


def test_what_is_in_the_way_of_a_run_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UsageError, match="run is in the way"), run_directory(tmp_path):
        pass


def test_a_link_to_somewhere_else_is_removed_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "llamaclust-precious"
    precious.mkdir()
    (tmp_path / "run").symlink_to(precious)
    with run_directory(tmp_path) as run:
        assert precious.exists() and not run.path.is_symlink()
    assert precious.exists()


def test_last_words_are_one_safe_line(tmp_path: Path) -> None:
    with run_directory(tmp_path) as run:
        launcher = LocalLauncher(run, tmp_path)
        assert launcher.last_error("a", 0.0) == ""
        (tmp_path / "a.log").write_bytes(b"x" * 10_000 + b"\nfirst\nlast \x1b[31mwords\xff\n\n  \n")
        assert launcher.last_error("a", 0.0) == "last [31mwords\ufffd"


def test_ends_of_processes_are_described() -> None:
    assert describe_exit(3) == "its process ended with exit code 3"
    assert describe_exit(-11) == "its process was killed by signal 11 (SIGSEGV)"
    assert describe_exit(-9).endswith("signal 9 (SIGKILL), by `kill` or for lack of memory")
    assert describe_exit(-250) == "its process was killed by signal 250 (unknown)"
