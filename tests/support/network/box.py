"""A virtual network: its hosts are network namespaces of this machine on one switch, and tests configure their links.

It needs root, iproute2 and iptables. It does not change the machine's own network, and leaves nothing behind, even
after a failed test or a killed process."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self, TypeVar

from support.network.link import Link, drop_rule, loss_rule, port_rule, queue_commands, refuse_rule
from support.network.namespaces import BoxError, inside, named, new_prefix, remove, run, stale
from support.paths import TESTS

T = TypeVar("T")

_NETWORK = "10.77.0."
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables"}
_READY_S = 20.0
_TERM_S = 5.0  # from SIGTERM to SIGKILL


def missing() -> str | None:
    """Returns a line that says why this machine cannot run a box, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    packages = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if packages:
        return f"missing: {', '.join(packages)} (Debian, Ubuntu: sudo make system-deps-test)"
    try:
        with Box(["a"], delays=True) as box:
            box.set_link(Link(rate_bit_s=10**9, loss=0.5))
    except (BoxError, OSError) as error:
        return f"no network namespaces here: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The prefix that runs a command on this host; it keeps the process id."""
        return ("ip", "netns", "exec", self.namespace)

    def command(self, *command: str) -> str:
        """Runs a command on this host and returns its output."""
        return run(*self.prefix, *command)

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function in a thread on this host and returns its result; its sockets remain on this host."""
        return inside(self.namespace, function)

    def listen(self, port: int) -> socket.socket:
        return self.call(lambda: socket.create_server((self.address, port)))

    def connect(self, host: Host, port: int, timeout_s: float = 5.0) -> socket.socket:
        return self.call(lambda: socket.create_connection((host.address, port), timeout_s))


class Box:
    """Hosts on a switch. With `delays` their links can have a delay; if the kernel has no netem, every packet then
    passes through an `emulator` process."""

    def __init__(self, names: Sequence[str], *, delays: bool = False) -> None:
        self._prefix = new_prefix()
        self._delays = delays
        self._netem = False
        self._janitor: subprocess.Popen[bytes] | None = None
        self._emulator: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: dict[str, Link] = {}
        self._filters: set[tuple[str, ...]] = set()  # (host, rule of iptables)
        self.hosts: Mapping[str, Host] = {
            name: Host(name, self._prefix + name, f"{_NETWORK}{number}") for number, name in enumerate(names, 1)
        }

    def __enter__(self) -> Self:
        remove(stale())
        self._janitor = _python("namespaces", self._prefix)
        try:
            for host in self.hosts.values():
                _make_namespace(host.namespace)
            self._netem = self._delays and self._has_netem()
            if self._delays and not self._netem:
                self._start_emulator()
            else:
                self._plug_bridge()
            self._links = dict.fromkeys(self.hosts, Link())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    # -- links ---------------------------------------------------------------------------------------------------------

    def set_link(self, link: Link, *names: str) -> None:
        """Sets the links of these hosts, or of all; existing connections remain."""
        assert self._delays or link.delay_s == 0, "a box that is to delay has to know it: Box(..., delays=True)"
        for name in names or self.hosts:
            host, before = self.hosts[name], self._links[name]
            if before.rate_bit_s is not None or (self._netem and before.delay_s > 0):
                host.command("tc", "qdisc", "del", "dev", "eth0", "root")
            for command in queue_commands(link, "eth0", netem=self._netem):
                host.command("tc", *command)
            if before.loss > 0:
                host.command("iptables", "-w", "-D", *loss_rule(before.loss))
            if link.loss > 0:
                host.command("iptables", "-w", "-A", *loss_rule(link.loss))
            if self._emulator is not None and link.delay_s != before.delay_s:
                self._tell_emulator(f"{host.address} {link.delay_s}")
            self._links[name] = link

    def black_hole(self, source: str, target: str) -> None:
        """Silently drops packets from `source` to `target`, but not in the other direction."""
        self._filter(target, drop_rule(self.hosts[source].address))

    def refuse(self, source: str, target: str) -> None:
        """Resets connections of `source` to `target`, existing and new ones."""
        self._filter(target, refuse_rule(self.hosts[source].address))

    def close_port(self, target: str, port: int, *, refuses: bool = False) -> None:
        """Drops packets to this port, or resets connections to it, as a firewall on the host does."""
        self._filter(target, port_rule(port, refuses=refuses))

    def filtered(self, target: str) -> int:
        """Counts the packets that matched the host's rules."""
        lines = self.hosts[target].command("iptables", "-w", "-nvxL", "INPUT").splitlines()[2:]
        return sum(int(line.split()[0]) for line in lines)

    def _filter(self, target: str, rule: list[str]) -> None:
        if (target, *rule) not in self._filters:
            self.hosts[target].command("iptables", "-w", "-A", *rule)
            self._filters.add((target, *rule))

    def unplug(self, name: str) -> None:
        """Takes the host's network device down: it neither receives nor sends."""
        run("ip", "-n", self.hosts[name].namespace, "link", "set", "eth0", "down")

    def plug(self, name: str) -> None:
        run("ip", "-n", self.hosts[name].namespace, "link", "set", "eth0", "up")

    def add_device(self, name: str, device: str) -> None:
        """Adds a second network device to a host, on the switch of the first, down and without an address."""
        port, switch = f"{device}-{[*self.hosts].index(name)}", f"{self._prefix}switch"
        commands = [f"link add {port} type veth peer name {device} netns {self.hosts[name].namespace}"]
        _ip_batch(switch, [*commands, f"link set {port} master bridge up"])

    def configure(self, name: str, *commands: str) -> None:
        """Runs commands of `ip` on a host."""
        _ip_batch(self.hosts[name].namespace, commands)

    def heal(self) -> None:
        """Removes black holes and refusals, and brings every device up; delays, rates and losses remain."""
        for target, *rule in self._filters:
            self.hosts[target].command("iptables", "-w", "-D", *rule)
        self._filters.clear()
        for name in self.hosts:
            self.plug(name)

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(
        self,
        name: str,
        *command: str,
        environment: Mapping[str, str] | None = None,
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process on a host; `pid` is that of the command, which ends with the box at the latest."""
        process = subprocess.Popen(
            [*self.hosts[name].prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
        )
        self._processes.append(process)
        return process

    # -- making and removing -------------------------------------------------------------------------------------------

    def _has_netem(self) -> bool:
        host = next(iter(self.hosts.values()))
        try:
            host.command("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except BoxError:
            return False
        host.command("tc", "qdisc", "del", "dev", "lo", "root")
        return True

    def _plug_bridge(self) -> None:
        switch = f"{self._prefix}switch"
        _make_namespace(switch)
        commands = ["link add bridge type bridge", "link set bridge up"]
        for host in self.hosts.values():
            port = f"to-{host.name}"
            commands.append(f"link add {port} type veth peer name eth0 netns {host.namespace}")
            commands.append(f"link set {port} master bridge up")
        _ip_batch(switch, commands)
        for host in self.hosts.values():
            _ip_batch(host.namespace, [f"addr add {host.address}/24 dev eth0", "link set eth0 up"])

    def _start_emulator(self) -> None:
        hosts = [f"{host.namespace}={host.address}/24" for host in self.hosts.values()]
        self._emulator = _python("emulator", *hosts)
        self._hear_emulator("up")

    def _tell_emulator(self, line: str) -> None:
        assert self._emulator is not None and self._emulator.stdin is not None
        self._emulator.stdin.write(f"{line}\n".encode())
        self._emulator.stdin.flush()
        self._hear_emulator("ok")

    def _hear_emulator(self, expected: str) -> None:
        assert self._emulator is not None and self._emulator.stdout is not None
        readable, _, _ = select.select([self._emulator.stdout], [], [], _READY_S)
        said = self._emulator.stdout.readline().decode().strip() if readable else "nothing"
        if said != expected:
            raise BoxError(f"the link emulator said {said or 'nothing and ended'}, not {expected}")

    def _close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            _end(process)
        for helper in (self._emulator, self._janitor):
            if helper is not None:
                helper.communicate()  # both end with their standard input; the janitor removes what is left
        remove(named(self._prefix))


def _make_namespace(name: str) -> None:
    run("ip", "netns", "add", name)
    run("ip", "-n", name, "link", "set", "lo", "up")


def _ip_batch(namespace: str, commands: Sequence[str]) -> None:
    run("ip", "-n", namespace, "-batch", "-", text="\n".join(commands) + "\n")


def _python(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts a module of this folder in its own session, with its standard input and output piped to this process."""
    return subprocess.Popen(
        [sys.executable, "-m", f"support.network.{module}", *arguments],
        cwd=TESTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(_TERM_S)
        return
    process.kill()
    process.wait(_TERM_S)
