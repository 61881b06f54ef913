"""Tests of emulated networks: hosts can reach only each other, and no namespace remains."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.network.box import Box
from support.network.link import Link
from support.network.namespaces import BoxError, named, new_prefix, remove, run
from support.paths import TESTS


def alive(pid: int) -> bool:
    """Returns True if the process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(condition: object, within_s: float = 60.0) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def own_network() -> list[str]:
    return [run(*command.split()) for command in ("ip -br addr", "ip -br link", "iptables -w -S", "tc qdisc")]


def prefix_of(box: Box) -> str:
    return box["a"].namespace.removesuffix("a")


def test_hosts_reach_each_other_and_themselves(box: Box) -> None:
    for caller, called in (("a", "b"), ("b", "a"), ("a", "a")):
        with box[called].listen(5000) as server, box[caller].connect(box[called], 5000), server.accept()[0] as peer:
            assert peer.getpeername()[0] == box[caller].address
    loopback = box["a"].call(lambda: socket.create_server(("127.0.0.1", 5001)))
    with loopback, box["a"].call(lambda: socket.create_connection(("127.0.0.1", 5001), 5.0)):
        pass


def test_the_machine_s_own_network_is_as_before() -> None:
    before = own_network()
    with Box(["a", "b"]), Box(["a", "b"], delays=True) as box:
        box.set_link(Link(loss=0.5))
        box.black_hole("a", "b")
        assert own_network() == before


def test_a_host_reaches_no_address_outside(box: Box) -> None:
    with pytest.raises(OSError) as caught:
        box["a"].call(lambda: socket.create_connection(("192.0.2.1", 80), 0.2))
    assert caught.value.errno == errno.ENETUNREACH
    with socket.create_server(("127.0.0.1", 0)) as ours, pytest.raises(ConnectionRefusedError):
        port = ours.getsockname()[1]
        box["a"].call(lambda: socket.create_connection(("127.0.0.1", port), 0.2))


def test_a_process_runs_on_its_host_and_ends_with_the_box() -> None:
    with Box(["a", "b"]) as box:
        there = box.start("b", "sh", "-c", "sleep 1000 & echo $!; ip addr show dev eth0; wait", stdout=subprocess.PIPE)
        stubborn = box.start("a", sys.executable, "-c", "import signal, time; signal.pause()")
        assert there.stdout is not None
        child = int(there.stdout.readline())
        assert box["b"].address in "".join(there.stdout.readline().decode() for _ in range(3))
        assert str(there.pid) in run("ip", "netns", "pids", box["b"].namespace).split()
        assert alive(child)
    assert (there.returncode, stubborn.returncode) == (-signal.SIGTERM, -signal.SIGTERM)
    assert soon(lambda: not alive(child)), "a process's own children end too"
    assert named(prefix_of(box)) == []
    there.stdout.close()


def test_a_command_that_fails_says_why(box: Box) -> None:
    with pytest.raises(BoxError, match=r"ip netns exec .*: ls: cannot access '/nowhere'"):
        box["a"].command("ls", "/nowhere")


def test_nothing_stays_of_a_test_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), Box(["a"], delays=True) as box:
        process = box.start("a", "sleep", "1000")
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGTERM
    assert named(prefix_of(box)) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_nothing_stays_of_a_process_that_is_killed(number: signal.Signals) -> None:
    program = """
import time
from support.network.box import Box
with Box(["a", "b"], delays=True) as box:
    print(box["a"].namespace, box.start("b", "sleep", "1000").pid, flush=True)
    time.sleep(1000)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=TESTS, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    namespace, pid = owner.stdout.readline().split()
    prefix = namespace.removesuffix("a")
    assert len(named(prefix)) >= 2
    assert alive(int(pid))
    owner.send_signal(number)
    owner.wait(10)
    owner.stdout.close()
    assert soon(lambda: named(prefix) == [] and not alive(int(pid)))


def test_a_box_sweeps_what_others_left_and_only_that() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = f"lcbox-{ended.pid}-12345-1-a"  # Its owner's process has ended.
    reused = f"lcbox-{os.getpid()}-12345-1-a"  # Another process has its owner's pid.
    ours, foreign = f"{new_prefix()}a", "lcboxer-1-a"
    try:
        for name in (left, reused, ours, foreign):
            run("ip", "netns", "add", name)
        with Box(["a"]):
            present = named("")
        assert left not in present and reused not in present
        assert ours in present and foreign in present
    finally:
        remove([left, reused, ours, foreign])


def test_boxes_live_side_by_side() -> None:
    with Box(["a", "b"]) as one, Box(["a", "b"], delays=True) as other:
        assert one["a"].address == other["a"].address
        assert re.fullmatch(r"lcbox-\d+-\d+-\d+-a", one["a"].namespace)
        with one["b"].listen(5000), pytest.raises(OSError):
            other["a"].connect(other["b"], 5000)
