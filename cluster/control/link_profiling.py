"""Links between the machines of a cluster: measured at its start and when a worker joins, kept for the next start."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.control.observed import Observed
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import profile_link
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.state.directory import read_values, write_values
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.addresses import is_loopback, split_address
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.profile import Profile
from llamaclust.wire.control.profiles import LinkProfile
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.link_probe import measure_link
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.wire.security.credentials import Credentials, Principal

if TYPE_CHECKING:
    from llamaclust.cluster.control.planning import ClusterPlanner

_FILE = ".links.json"  # no cluster's name begins with a dot

Pair = tuple[str, str]


def hops_matter(measured: Mapping[str, Profile]) -> bool:
    """Whether processes of one machine are worth measuring their links: several, beside whose steps a hop shows."""
    return len(measured) > 1 and all(profile.cpu.concurrent for profile in measured.values())


async def measure_links(
    workers: Mapping[str, WorkerHandle], credentials: Credentials, state_dir: Path, report: Report
) -> Links:
    """Between all of them and the coordinator. What cannot be measured is reported, and unknown to the plan."""
    registered = {name: worker.registration for name, worker in workers.items()}
    for name, address in _unreachable_by_others({name: own.address for name, own in registered.items()}).items():
        what = "start it with --join and an address of its machine that others reach, or with --advertise"
        report(Notice(f"worker {name} is served at {address}, which no other machine can reach: {what}"))
    keys = _keys({name: _machine(own.host, own.address, own.fingerprint) for name, own in registered.items()})
    known, attempted = _read(state_dir), set[Pair]()
    new: dict[str, Link] = {}
    while missing := [pair for pair, key in keys.items() if key not in known | new and pair not in attempted]:
        concurrent = _disjoint(missing, keys)
        attempted.update(concurrent)
        found = await asyncio.gather(*(_measured(pair, workers, credentials, report) for pair in concurrent))
        new |= {keys[pair]: link for pair, link in zip(concurrent, found, strict=True) if link is not None}
    if new:
        write_values(state_dir / _FILE, known | new)
    return _links(keys, known | new)


def _unreachable_by_others(addresses: Mapping[str, str]) -> dict[str, str]:
    """Of workers, by name, those that only their own machine can reach, where others are reached over a network."""
    hosts = {name: split_address(address)[0] for name, address in addresses.items() if not address.startswith("unix:")}
    loopback = {name: addresses[name] for name, host in hosts.items() if is_loopback(host)}
    return {} if len(loopback) == len(addresses) else loopback


def kept_links(fingerprints: Mapping[str, str], state_dir: Path) -> Links:
    """What is known of local workers, given by name: from a start on the same machine."""
    host = socket.gethostname()
    machines = {name: _machine(host, "unix:", fingerprint) for name, fingerprint in fingerprints.items()}
    return _links(_keys(machines), _read(state_dir))


def _read(state_dir: Path) -> dict[str, Link]:
    return read_values(state_dir / _FILE, lambda link: Link(float(link["one_way_s"]), float(link["byte_s"])))


def _disjoint(pairs: list[Pair], keys: Mapping[Pair, str]) -> list[Pair]:
    """Pairs to measure concurrently: one of each key, and no two that share an end."""
    disjoint: list[Pair] = []
    taken: set[str] = set()
    for pair in pairs:
        if not taken.intersection((*pair, keys[pair])):
            disjoint.append(pair)
            taken.update((*pair, keys[pair]))
    return disjoint


def _machine(host: str, address: str, fingerprint: str) -> str:
    return f"{host} ({address.rpartition(':')[0]}, {fingerprint})"


def _keys(machines: Mapping[str, str]) -> dict[Pair, str]:
    """By pairs of the coordinator, which comes first, and workers; equal for pairs of the same two machines."""
    machines = {COORDINATOR: f"coordinator on {socket.gethostname()}", **machines}
    return {pair: " - ".join(sorted(machines[name] for name in pair)) for pair in combinations(machines, 2)}


def _links(keys: Mapping[Pair, str], known: Mapping[str, Link]) -> Links:
    return Links({frozenset(pair): known[key] for pair, key in keys.items() if key in known})


async def _measured(
    pair: Pair, workers: Mapping[str, WorkerHandle], credentials: Credentials, report: Report
) -> Link | None:
    source, target = pair
    try:
        if source == COORDINATOR:
            speed = await _from_here(workers[target], credentials)
        else:
            speed = await profile_link(workers[source], workers[target])
    except LlamaclustError as error:
        report(Notice(f"the link between {source or 'the coordinator'} and {target} could not be measured: {error}"))
        return None
    return Link(speed.round_trip_s / 2, 1 / speed.bytes_s)


async def _from_here(worker: WorkerHandle, credentials: Credentials) -> LinkProfile:
    peer = Peer(worker.registration.address, credentials, Principal(worker.name))
    try:
        return await measure_link(peer)
    finally:
        await peer.close()


MeasureLinks = Callable[[Mapping[str, WorkerHandle]], Awaitable[Links]]


@dataclass(frozen=True, slots=True, eq=False)
class LinkMonitor:
    """Without `measure`, links stay as they are known."""

    _measure: MeasureLinks | None
    _registry: Registry
    _planner: ClusterPlanner
    _observed: Observed
    _report: Report
    _measuring: TaskSet = field(default_factory=TaskSet, init=False)

    def measure_again(self) -> None:
        """Once the pipeline serves and nothing else is to be done."""
        if self._measure is not None and not len(self._measuring):
            self._measuring.start(self._measure_all(self._measure))

    def close(self) -> None:
        self._measuring.cancel()

    async def _measure_all(self, measure: MeasureLinks) -> None:
        """Until the measured workers are the present ones."""
        measured: dict[str, WorkerHandle] = {}
        while measured != self._registry.present:
            await self._observed.settled.wait()
            measured = self._registry.present
            try:
                links = await measure(measured)
            except LlamaclustError as error:
                self._report(Notice(f"links were not measured again: {error}"))
                return
            if self._planner.update(links):
                self._observed.post(Signal.LINKS_CHANGED)
