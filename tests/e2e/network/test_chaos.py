"""Tests of `chaos`, which disturbs links with firewall rules in its own table. The table is always removed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaclust.model.quant_types import QuantType
from llamaclust.tools.chaos.firewall import Firewall, FirewallError
from llamaclust.tools.chaos.links import Disturbance, WorkerLink
from support.clusters.command_line import CommandLine, Done, eventually
from support.models.tiny_model import build_tiny_model
from support.network.box import Box, Host
from support.network.distant_cluster import COORDINATOR, distant_cluster

PORT, OWN_PORT, OTHER_PORT = 7102, 7100, 7200
CUT_THEN_SLOW = 57268  # After 0.75 s, worker a is cut off for 2.6 s. Then the link of worker b is slow.
FAULTS = ("--faults", "partition,slow-link", "--seed", str(CUT_THEN_SLOW), "--minutes", "0.06", "--streams", "4")
AT_ONCE_S = 0.2
IN_ITS_OWN_TIME = """
import sys
from llamaclust.tools.chaos.firewall import Firewall
from llamaclust.tools.chaos.links import Disturbance, WorkerLink
firewall = Firewall()
link = WorkerLink(frozenset({sys.argv[1]}), frozenset({7102}))
firewall.run(link.commands(firewall.table, "f1", Disturbance.CUT, 60.0))
print("cut", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _can_filter() -> None:
    def open_and_close() -> None:
        Firewall().close()

    with Box(["a"]) as box:
        try:
            box["a"].call(open_and_close)
        except FirewallError as error:
            pytest.skip(f"{error}")


def tables(host: Host) -> list[str]:
    return host.command("nft", "list", "tables").splitlines()


def reaches(source: Host, target: Host, port: int) -> bool:
    try:
        source.connect(target, port, AT_ONCE_S).close()
    except TimeoutError:
        return False
    return True


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    """Yields two hosts that listen on the ports. Host b acts as a worker, and host a as its coordinator."""
    with Box(["a", "b"]) as box:
        listening = [box["b"].listen(PORT), box["b"].listen(OTHER_PORT), box["a"].listen(OWN_PORT)]
        yield box["a"], box["b"]
        for server in listening:
            server.close()


def test_a_link_is_cut_in_both_directions_until_its_end(pair: tuple[Host, Host]) -> None:
    a, b = pair
    firewall = a.call(Firewall)
    link = WorkerLink(frozenset({b.address}), frozenset({PORT}), frozenset({OWN_PORT}))
    firewall.run(link.commands(firewall.table, "f1", Disturbance.CUT, 60.0))
    assert not reaches(a, b, PORT) and not reaches(b, a, OWN_PORT)
    assert reaches(a, b, OTHER_PORT)
    firewall.run(link.end_commands(firewall.table, "f1"))
    assert reaches(a, b, PORT) and reaches(b, a, OWN_PORT)
    firewall.close()
    assert tables(a) == []


def test_the_kernel_ends_a_fault_at_its_time(pair: tuple[Host, Host]) -> None:
    a, b = pair
    firewall = b.call(Firewall)
    link = WorkerLink(frozenset({b.address}), frozenset({PORT}))
    firewall.run(link.commands(firewall.table, "f1", Disturbance.CUT, 5.0))
    assert not reaches(a, b, PORT)
    eventually(lambda: reaches(a, b, PORT), 60.0, "the end of the fault")
    firewall.close()


def test_rules_go_with_their_process_and_are_no_one_elses(pair: tuple[Host, Host]) -> None:
    a, b = pair
    command = [*b.prefix, sys.executable, "-P", "-c", IN_ITS_OWN_TIME, b.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"cut\n"
        b.command("nft", "flush", "ruleset")  # A firewall service does this when it reloads.
        assert not reaches(a, b, PORT)
        process.send_signal(signal.SIGKILL)
    assert reaches(a, b, PORT) and tables(b) == []


def test_a_slow_link_drops_what_is_too_much(pair: tuple[Host, Host]) -> None:
    a, b = pair
    firewall = a.call(Firewall)
    link = WorkerLink(frozenset({b.address}), frozenset({OTHER_PORT}), frozenset({OWN_PORT}))
    firewall.run(link.commands(firewall.table, "f1", Disturbance.SLOW, 60.0))
    with a.connect(b, OTHER_PORT) as connection:
        connection.settimeout(AT_ONCE_S)
        with pytest.raises(TimeoutError):
            connection.sendall(bytes(16 << 20))
    firewall.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny.gguf", layers=4, quant_type=QuantType.Q8_0)


def succeeded(done: Done) -> bool:
    """Checks that `chaos` succeeded. Returns True if there were faults of both kinds."""
    assert done.code == 0, (done.out, done.err)
    assert re.search(r"^nothing lost, nothing changed: \d+ faults?,", done.out)
    return "\npartition of a worker: " in done.out and "\nslow link of a worker: " in done.out


def repeat_chaos(line: CommandLine, network: str) -> None:
    """Repeats `chaos` until there were faults of both kinds, because a pause can leave no time for the second one."""
    while not succeeded(line.start("chaos", *FAULTS, network=network).wait(240)):
        pass


PLANS: dict[str, dict[str, Any]] = {
    "stages": {},
    "a group": {"plan": [{"workers": ["a", "b"], "layers": [0, 4]}]},
}


@pytest.mark.promise
@pytest.mark.parametrize("plan", PLANS)
def test_workers_on_other_machines_change_no_answer(model: Path, plan: str) -> None:
    with (
        Box((COORDINATOR, "a", "b")) as box,
        distant_cluster(box, model, timeouts={"worker": "1s"}, **PLANS[plan]) as cluster,
    ):
        repeat_chaos(cluster.line, box[COORDINATOR].namespace)
        assert tables(box[COORDINATOR]) == []


@pytest.mark.parametrize("plan", PLANS)
def test_workers_on_the_same_machine_change_no_answer(model: Path, line: CommandLine, plan: str) -> None:
    speed = {"memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}
    keys: dict[str, Any] = {
        "launcher": "static",
        "listen": "127.0.0.1:8080",
        "join": {"listen": "127.0.0.1:7100", "members": "127.0.0.1:7101"},
        "workers": [{"name": name, **speed} for name in "ab"],
        "objective": "throughput",
        "timeouts": {"worker": "1s"},
        **PLANS[plan],
    }
    file = line.cluster_file(model, **keys)
    with Box(("all",)) as box:
        inside = box["all"].namespace
        coordinator = line.start("up", file, network=inside)
        token = line.state_dir / ".trust" / "token"
        eventually(token.is_file, 60.0, "the join token")
        for port, name in enumerate("ab", 7102):
            own = ("--name", name, "--listen", f"127.0.0.1:{port}", "--threads", "1", "--token-file", token)
            line.start("worker", "--join", "127.0.0.1:7100", *own, network=inside)
        coordinator.says("tiny is ready")
        repeat_chaos(line, inside)
        assert tables(box["all"]) == []
        line.end_commands()
