"""Measures links between machines at the start and when a worker joins. Keeps the results for the next start."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import TypeAdapter

from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import profile_link
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.state.directory import read_values, write_private
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.cluster.state.measurements import newest
from llamaclust.core.addresses import is_loopback, split_address
from llamaclust.core.errors import DeadlineError, LlamaclustError
from llamaclust.core.profile import Profile
from llamaclust.core.this_machine import machine_id
from llamaclust.wire.control.messages import Register
from llamaclust.wire.control.profiles import LinkProfile
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.link_probe import PING_BYTES, measure_link
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials

if TYPE_CHECKING:
    from llamaclust.cluster.control.actions import ActionRunner

_FILE = ".links.json"  # The file's name begins with a dot, so it cannot be a cluster's folder.
_LINKS = TypeAdapter(dict[str, Link])
_UNIX = ", unix"
_MOST_MACHINES = 16
"""Maximum number of machines for which all pairs are measured. With more, the measurement would take minutes."""
_MOST_KEPT = 2048
"""Maximum number of links that are kept. Links that no connected worker uses are dropped first."""

Pair = tuple[str, str]


def needs_links(measured: Mapping[str, Profile]) -> bool:
    """Returns True if links between the workers of one machine should be measured, too."""
    return len(measured) > 1 and all(profile.cpu.concurrent for profile in measured.values())


async def measure_links(
    workers: Mapping[str, WorkerHandle],
    credentials: Credentials,
    state_dir: Path,
    report: Report,
    *,
    anew: bool = False,
) -> Links:
    """Measures and stores the links between all workers and the coordinator. Failures are reported, not raised."""
    registered = {name: worker.registration for name, worker in workers.items()}
    for name, address in _unreachable_by_others({name: own.address for name, own in registered.items()}).items():
        what = "start it with --join and an address that other machines can reach, or with --advertise"
        report(Notice(f"worker {name} listens at {address}, which no other machine can reach: {what}"))
    keys = _keys(_places(registered))
    known, attempted = _read(state_dir), set[Pair]()
    silent = {name for name, worker in workers.items() if worker.channel.is_silent}
    wanted = _wanted(keys, sorted(workers))
    if anew:
        known = {key: link for key, link in known.items() if key not in {keys[pair] for pair in wanted}}
    while missing := [
        pair for pair in wanted if keys[pair] not in known and pair not in attempted and silent.isdisjoint(pair)
    ]:
        concurrent = _disjoint(missing, keys)
        attempted.update(concurrent)
        found = await asyncio.gather(*(_measured(pair, workers, credentials, report, silent) for pair in concurrent))
        known |= {keys[pair]: link for pair, link in zip(concurrent, found, strict=True) if link is not None}
    if attempted:
        kept = _LINKS.dump_json(newest(known, keys.values(), _MOST_KEPT)).decode()
        write_private(state_dir / _FILE, kept, is_synced=False)
    links = _links(keys, known)
    return links if len(wanted) == len(keys) else links.estimated(frozenset(pair) for pair in keys.keys() - {*wanted})


def _wanted(keys: Mapping[Pair, str], names: Sequence[str]) -> list[Pair]:
    """Lists the pairs to measure. With many machines, omits pairs of workers that are not neighbours in `names`."""
    if len({key for pair, key in keys.items() if COORDINATOR in pair}) <= _MOST_MACHINES:
        return [*keys]
    neighbours = {frozenset(pair) for pair in pairwise([*names, *names[:1]])}
    return [pair for pair in keys if COORDINATOR in pair or frozenset(pair) in neighbours]


def _unreachable_by_others(addresses: Mapping[str, str]) -> dict[str, str]:
    """Returns the loopback addresses, which other machines cannot reach. Returns {} if all addresses are loopback."""
    hosts = {name: split_address(address)[0] for name, address in addresses.items() if not address.startswith("unix:")}
    loopback = {name: addresses[name] for name, host in hosts.items() if is_loopback(host)}
    return {} if len(loopback) == len(addresses) else loopback


def kept_links(fingerprints: Mapping[str, str], state_dir: Path) -> Links:
    here = _Place(machine_id(), socket.gethostname(), _UNIX)
    places = {name: here.text(fingerprint) for name, fingerprint in fingerprints.items()}
    return _links(_keys(places), _read(state_dir))


def stored_links(workers: Mapping[str, WorkerHandle], state_dir: Path) -> Links:
    return _links(_keys(_places({name: worker.registration for name, worker in workers.items()})), _read(state_dir))


def _read(state_dir: Path) -> dict[str, Link]:
    return read_values(state_dir / _FILE, _LINKS)


def _disjoint(pairs: list[Pair], keys: Mapping[Pair, str]) -> list[Pair]:
    disjoint: list[Pair] = []
    taken: set[str] = set()
    for pair in pairs:
        if not taken.intersection((*pair, keys[pair])):
            disjoint.append(pair)
            taken.update((*pair, keys[pair]))
    return disjoint


class _Place(NamedTuple):
    machine: str
    host: str  # Pods keep their host names, but not always their addresses.
    way: str = ""  # ", unix" for Unix sockets, or ", ADDRESS" if the host has several addresses.

    def text(self, fingerprint: str) -> str:
        return f"{self.host} ({self.machine}{self.way}, {fingerprint})"


def _places(registered: Mapping[str, Register]) -> dict[str, str]:
    """Returns text that identifies the host, address and hardware of each worker."""
    ways = {name: own.address.rpartition(":")[0] for name, own in registered.items()}
    found = {name: _Place(own.machine, own.host) for name, own in registered.items()}
    of_place: dict[_Place, set[str]] = {}
    for name, place in found.items():
        of_place.setdefault(place, set()).add(ways[name])
    return {
        name: place._replace(way=_way(ways[name], len(of_place[place]))).text(registered[name].fingerprint)
        for name, place in found.items()
    }


def _way(host: str, count: int) -> str:
    if host.startswith("unix"):
        return _UNIX
    return f", {host}" if count > 1 else ""


def _keys(places: Mapping[str, str]) -> dict[Pair, str]:
    """Returns the keys under which links are stored, by pair of workers."""
    places = {COORDINATOR: f"coordinator on {socket.gethostname()} ({machine_id()})", **places}
    return {pair: " - ".join(sorted(places[name] for name in pair)) for pair in combinations(places, 2)}


def _links(keys: Mapping[Pair, str], known: Mapping[str, Link]) -> Links:
    return Links({frozenset(pair): known[key] for pair, key in keys.items() if key in known})


async def _measured(
    pair: Pair, workers: Mapping[str, WorkerHandle], credentials: Credentials, report: Report, silent: set[str]
) -> Link | None:
    """Measures a link. On failure, reports it and returns None. Adds a worker that did not answer to `silent`."""
    source, target = pair
    try:
        if source == COORDINATOR:
            speed = await _from_here(workers[target], credentials)
        else:
            speed = await profile_link(workers[source], workers[target])
    except LlamaclustError as error:
        if isinstance(error, DeadlineError):
            silent.add(source if source != COORDINATOR and workers[source].channel.is_silent else target)
            if source == COORDINATOR:
                workers[target].channel.miss(error)
        report(Notice(f"the link between {source or 'the coordinator'} and {target} could not be measured: {error}"))
        return None
    return _link(speed)


def _link(speed: LinkProfile) -> Link:
    byte_s = 1 / speed.bytes_s
    network_s = None if speed.network_s is None else speed.network_s / 2
    # The latency excludes the ping's transfer time, because plans add transfer times.
    return Link(max(0.0, speed.round_trip_s - PING_BYTES * byte_s) / 2, byte_s, network_s)


async def _from_here(worker: WorkerHandle, credentials: Credentials) -> LinkProfile:
    peer = Peer(worker.registration.address, credentials, Principal(worker.name))
    try:
        return await measure_link(peer)
    finally:
        await peer.close()


MeasureLinks = Callable[[Mapping[str, WorkerHandle]], Awaitable[Links]]


@dataclass(frozen=True, slots=True, eq=False)
class LinkMonitor:
    """Measures links again when workers join. If `measure` is None, the known links are kept."""

    _measure: MeasureLinks | None
    _registry: Registry
    _runners: Sequence[ActionRunner]
    _report: Report
    _measuring: TaskSet = field(default_factory=TaskSet, init=False)

    def measure_again(self) -> None:
        if self._measure is not None and not len(self._measuring):
            self._measuring.start(self._measure_all(self._measure))

    def close(self) -> None:
        self._measuring.cancel()

    async def _measure_all(self, measure: MeasureLinks) -> None:
        measured: dict[str, WorkerHandle] = {}
        while measured != self._registry.present:
            for runner in self._runners:
                await runner.store.settled.wait()
            measured = self._registry.present
            try:
                links = await measure(measured)
            except LlamaclustError as error:
                self._report(Notice(f"links could not be measured again: {error}"))
                return
            for runner in self._runners:
                if runner.planner.update(links):
                    runner.store.post(Signal.LINKS_CHANGED)
