"""Waits for workers that a user or another program starts on any machine. They enrol and join in any order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.arrivals import Arrivals, Awaited, Shortfall
from llamaclust.cluster.launchers.base import Exited, GaveUp, Launcher
from llamaclust.cluster.launchers.restarts import RestartPolicy
from llamaclust.cluster.membership.authority import Authority, trust_folder
from llamaclust.cluster.membership.enrolment import EnrolmentServer
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import AwaitingWorkers, Report
from llamaclust.core.addresses import ANYWHERE, joined_address, split_address
from llamaclust.core.interfaces import one_of_each_interface
from llamaclust.core.sizes import counted
from llamaclust.model.loader import Model
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.credentials import Identity, Insecure
from llamaclust.wire.security.renewal import until_renewal
from llamaclust.worker.settings import WorkerSettings

_STARTING_S = 60.0
_MOST_HOSTS = 4
_GPU = "  on a machine with an NVIDIA GPU, add --device cuda:0"

INSECURE = (
    "INSECURE: links between machines are neither encrypted nor authenticated; any client that reaches them is trusted"
)


class StaticLauncher(Launcher):
    """A launcher that starts no processes. It serves the enrolment port, and prints the commands that start workers."""

    def __init__(self, config: ClusterConfig, folder: ClusterDir, report: Report) -> None:
        """Creates the certificate authority of the cluster if there is none. Raises the errors of `Authority.open`."""
        self.authority: Authority | None = None
        self.credentials: Identity | Insecure = Insecure()
        self.listen = config.join.listen
        self.coordinator_s = config.timeouts.coordinator
        if not config.insecure:
            own = folder.path / "trust" if config.launcher_facts.starts_workers else trust_folder(folder.path)
            self.authority = Authority.open(config.join.trust_dir or own)
            self.credentials = self.authority.identity()
            self.certify = self.authority.certify
            self.listen = config.join.members
        self._config = config
        self._report = report
        self._names = None if config.awaits_any else [worker.name for worker in config.workers]
        self._ends = contextlib.AsyncExitStack()

    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        """Checks nothing. Workers on other machines report errors when they load."""

    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        self._report(AwaitingWorkers(tuple(self._instructions(await self.open(join))), tuple(self.missing(()))))

    async def open(self, join: str) -> str:
        if self.authority is None or not isinstance(self.credentials, Identity):
            return join
        renewing = asyncio.create_task(keep_renewed(self.authority, self.credentials))
        self._ends.callback(renewing.cancel)
        port = int(join.rpartition(":")[2])
        server = EnrolmentServer(self._config.join.listen, self.authority, self.credentials, self.refusal, port)
        address = (await self._ends.enter_async_context(server)).address
        if self._config.join.discover:
            from llamaclust.wire.discovery import announced

            await self._ends.enter_async_context(announced(self._config.name, self.authority.cluster, address))
        return address

    async def stop(self) -> None:
        """Closes the enrolment port. The workers continue, because other programs have started them."""
        await self._ends.aclose()

    def restarting(self, gave_up: GaveUp) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reset_restarts(self) -> None:
        """Does nothing, because this launcher does not count restarts."""

    async def end(self, name: str) -> None:
        """Does nothing. A lost worker unloads its stages when it learns that it is no longer a member."""

    def last_error(self, name: str, silent_s: float) -> str:
        return ""

    def refusal(self, name: str) -> str | None:
        names = self._names
        if names is None or name in names:
            return None
        return f"the cluster file has no worker named {name}; it has {', '.join(names)}"

    def missing(self, present: Collection[str]) -> list[str]:
        return self.awaited.missing(present)

    async def joined(self, registry: Registry, shortfall: Shortfall) -> None:
        await Arrivals(self.awaited, registry, shortfall, self._report).wait()

    @property
    def awaited(self) -> Awaited:
        """The workers that the start waits for: `workers` in the cluster file, or else the workers in its `plan`."""
        config = self._config
        planned = dict.fromkeys(name for entry in config.plan or () for name in entry.names)
        names = tuple(planned) if self._names is None else tuple(self._names)
        return Awaited(names, max(len(names), len(config.workers)), self._grace_s, config.join.wait)

    @property
    def _grace_s(self) -> float:
        return 2 * self._config.timeouts.worker

    def _instructions(self, listen: str) -> list[str]:
        """Returns instructions to start workers on other machines. They name the token file, but not the token."""
        host, port = split_address(listen)
        hosts = one_of_each_interface()[:_MOST_HOSTS] if host in ANYWHERE else [host]
        addresses = self._config.join.addresses or [joined_address(each, port) for each in hosts or [host]]
        joins = " ".join(f"--join {address}" for address in addresses)
        command = f"llamaclust worker {'--discover' if self._config.join.discover else joins} --name NAME"
        which = (
            counted(len(self._config.workers), "worker") if self._names is None else f"workers {', '.join(self._names)}"
        )
        if self.authority is None:
            return [INSECURE, f"waiting for {which}; on each machine:", f"  {command} --insecure", _GPU]
        copy = f"copy {self.authority.token_file} to each machine (mode 0600: it is a secret), then run there"
        reach = [f"  where multicast fails, use {joins} instead of --discover"] if self._config.join.discover else []
        return [f"waiting for {which}; {copy}:", f"  {command} --token-file FILE", *reach, _GPU]


class RestartingLauncher(StaticLauncher):
    """Base class of launchers that restart workers on other machines. The workers join like static workers."""

    def __init__(self, config: ClusterConfig, folder: ClusterDir, report: Report) -> None:
        super().__init__(config, folder, report)
        self._restarts = RestartPolicy()
        self._last_errors: dict[str, str] = {}

    def restarting(self, gave_up: GaveUp) -> contextlib.AbstractContextManager[None]:
        return self._restarts.on(gave_up)

    def reset_restarts(self) -> None:
        self._restarts.reset_restarts()

    def last_error(self, name: str, silent_s: float) -> str:
        return self._last_errors.get(name, "")

    @property
    def _grace_s(self) -> float:
        return max(_STARTING_S, super()._grace_s)


async def keep_renewed(authority: Authority, identity: Identity) -> None:
    while True:
        await until_renewal(identity)
        identity.pair = authority.new_pair(COORDINATOR)
