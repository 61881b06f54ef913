"""Tests of a standby coordinator at other addresses: it takes over workers and requests, and clients get the same
answers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cli.cluster import down
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import CommandLine, Running, eventually
from support.clusters.static_cluster import logged, named, new_trust, start_worker
from support.clusters.streamed_answers import STREAMS, TOKENS, answers, undisturbed
from support.kubernetes.lease_api import LeaseApi, lease_api, lease_values
from support.models.tiny_model import build_tiny_model
from support.network.front import front_of
from support.network.loopback import free_port


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny.gguf", layers=4, quant_type=QuantType.Q8_0, vocabulary=320)


@pytest.fixture
def api() -> Iterator[LeaseApi]:
    with lease_api() as server:
        yield server


class TwoCoordinators:
    """Starts two coordinators of a static cluster, and two workers that know both enrolment ports."""

    def __init__(self, line: CommandLine, model: Path, **keys: Any) -> None:
        self._line = line
        self.ports = [free_port() for _ in range(2)]
        self._join = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        join = {"members": "127.0.0.1:0", "addresses": self._join}
        plan = [{"worker": "a", "layers": [0, 2]}, {"worker": "b", "layers": [2, 4]}]
        fixed: dict[str, Any] = {"launcher": "static", "workers": named("a", "b"), "plan": plan, "kv_memory": "8MiB"}
        self._file = line.cluster_file(model, **fixed, context_length=1280, join=join, **keys)
        new_trust(line)

    def start(self, number: int, *options: str) -> Running:
        own = ("--set", f"listen=127.0.0.1:{self.ports[number]}", "--set", f"join.listen={self._join[number]}")
        return self._line.start("up", self._file, *own, *options)

    def start_workers(self) -> list[Running]:
        port = int(self._join[0].rpartition(":")[2])
        return [start_worker(self._line, port, name, "--join", self._join[1]) for name in ("a", "b")]

    @property
    def command(self) -> str:
        """Returns the command for workers that `up` prints."""
        return f"llamaclust worker --join {self._join[0]} --join {self._join[1]} --name NAME"


async def has_arrived(arrived: list[int], wanted: int, asking: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(60):
        while (sum(arrived) < wanted or not all(arrived)) and not asking.done():  # noqa: ASYNC110  counted by other tasks
            await asyncio.sleep(0.001)
    assert not asking.done()


@pytest.mark.promise
@pytest.mark.parametrize("lock", ["file", "lease"])
async def test_a_standby_at_other_addresses_takes_over(
    line: CommandLine, model: Path, api: LeaseApi, tmp_path: Path, lock: str
) -> None:
    keys = {} if lock == "file" else {"lease": lease_values(api, tmp_path, "10s")}
    both = TwoCoordinators(line, model, **keys)
    first = both.start(0)
    workers = both.start_workers()
    await asyncio.to_thread(first.says, both.command)
    await asyncio.to_thread(first.says, "tiny is ready")
    standby = both.start(1, "--standby")
    waiting = "this standby takes over" if lock == "file" else "waiting for the Lease brain"
    await asyncio.to_thread(standby.says, waiting)
    async with front_of(both.ports) as url:
        expected = await undisturbed(url, model)
        arrived = [0] * STREAMS
        asking = asyncio.create_task(answers(url, arrived))
        await has_arrived(arrived, STREAMS * TOKENS // 3, asking)
        os.kill(first.process.pid, signal.SIGKILL)
        await asyncio.to_thread(standby.says, "tiny is ready")
        async with asyncio.timeout(120):
            assert await asking == expected
    for worker in workers:
        assert worker.err.read_text().count("its weights were kept") == 1
    standby.process.send_signal(signal.SIGTERM)
    assert standby.wait().code == 0
    for worker in workers:
        if lock == "file":
            assert worker.wait().code == 0
        else:  # The workers wait for the next holder of the lease.
            logged(worker, "waiting for the coordinator", 2)


async def test_the_holder_of_a_lease_hands_its_cluster_over_when_it_is_stopped(
    line: CommandLine, model: Path, api: LeaseApi, tmp_path: Path
) -> None:
    """The standby is alive but not ready until the holder stops. A request that takes longer than the drain continues
    on the standby."""
    both = TwoCoordinators(line, model, lease=lease_values(api, tmp_path, "10s"))
    first = both.start(0)
    both.start_workers()
    await asyncio.to_thread(first.says, "tiny is ready")
    second = both.start(1)
    await asyncio.to_thread(second.says, "waiting for the Lease brain")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{both.ports[1]}", trust_env=False) as http:
        assert [(await http.get(path)).status_code for path in ("/live", "/health")] == [200, 503]
    async with front_of(both.ports) as url:
        expected = await undisturbed(url, model)
        arrived = [0] * STREAMS
        asking = asyncio.create_task(answers(url, arrived))
        await has_arrived(arrived, STREAMS, asking)
        for _ in range(2):  # The second signal ends the drain.
            first.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
        assert (await asyncio.to_thread(first.wait)).code == 0
        async with asyncio.timeout(120):
            assert await asking == expected
    assert not second.process.poll()


def test_the_holder_of_a_lease_that_it_loses_ends_at_once(
    line: CommandLine, model: Path, api: LeaseApi, tmp_path: Path
) -> None:
    with line.cluster(model, lease=lease_values(api, tmp_path, "10s")) as cluster:
        api.change(holderIdentity="another")
        done = cluster.command.wait()
        assert done.code == 1
        assert "this coordinator ends, because it has lost the Lease brain: another has" in done.err
    waiting = line.start("up", line.cluster_file(model, lease=lease_values(api, tmp_path, "10s")))
    waiting.says("waiting for the Lease brain")
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.wait().code == 0


def test_down_of_a_coordinator_that_hangs_ends_its_standby(
    line: CommandLine, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with line.cluster(model) as cluster:
        standby = line.start("up", line.cluster_file(model), "--standby")
        standby.says("this standby takes over")
        eventually(lambda: ClusterDir(line.cluster_dir("tiny")).has_standby, 60.0, "the standby's wait")
        os.kill(cluster.pid, signal.SIGSTOP)
        monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(line.state_dir))
        monkeypatch.setattr("llamaclust.cli.cluster._STOP_S", 0.2)
        down("tiny")
        assert "tiny has not ended within 0 s: it is killed now\n" in capsys.readouterr().err
        ended = standby.wait()
        assert ended.code == 0 and "tiny was stopped, so this standby ends too" in ended.err


_NEVER_READY = """
import asyncio, sys
from llamaclust.cluster.server import serve
async def startup(self, sockets=None):
    print("restored, not ready", file=sys.stderr, flush=True)
    await asyncio.sleep(60)
serve._Server.startup = startup
from llamaclust.cli.main import main
main()
"""


async def test_a_coordinator_that_is_stopped_before_it_is_ready_leaves_requests_to_the_next(
    line: CommandLine, model: Path
) -> None:
    keys: dict[str, Any] = {"listen": f"127.0.0.1:{free_port()}", "context_length": 1280}
    with line.cluster(model, **keys) as cluster:
        expected = await undisturbed(cluster.api, model)
        arrived = [0] * STREAMS
        asking = asyncio.create_task(answers(cluster.api, arrived))
        await has_arrived(arrived, STREAMS * TOKENS // 3, asking)
        os.kill(cluster.pid, signal.SIGKILL)
        script = line.folder / "never_ready.py"
        script.write_text(_NEVER_READY)
        program = (sys.executable, "-P", script)
        stopped = line.start("up", line.cluster_file(model, **keys), program=program)
        await asyncio.to_thread(stopped.says, "restored, not ready")
        stopped.process.send_signal(signal.SIGTERM)
        assert (await asyncio.to_thread(stopped.wait)).code == 0
        again = line.start("up", line.cluster_file(model, **keys))
        await asyncio.to_thread(again.says, "tiny is ready")
        async with asyncio.timeout(120):
            assert await asking == expected
