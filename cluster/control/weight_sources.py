"""Finds out who has a model's weights, for those workers of a plan that have not its file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from math import inf, log

from llamaclust.cluster.membership.worker_handle import STALL_S, WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.core.errors import DeadlineError, LlamaclustError, WorkerError
from llamaclust.wire.control.messages import (
    AddWeightSource,
    FindWeightsProgress,
    WeightsFound,
    WeightSource,
    WeightSources,
)
from llamaclust.wire.rpc.deadlines import deadline

_log = logging.getLogger(__name__)

_PIECE_BYTES = 8e6
"""Weights come in pieces of such a size."""
_ALIKE = 1.25
"""Links that differ by less bring as much."""

OnReading = Callable[[str, FindWeightsProgress], None]
"""Called with the name of a worker that reads its file for others, and how far it is."""

_TELL_S = 5.0


async def weight_sources(
    loading: Collection[str],
    workers: Mapping[str, WorkerHandle],
    model_path: str,
    model_id: str,
    links: Links = UNKNOWN,
    on_reading: OnReading = lambda worker, progress: None,
    stall_s: float = STALL_S,
) -> dict[str, WeightSources]:
    """For each of the workers in `loading` that has not the file, whom to ask for its layers; workers that have it are
    left out, and so are all where nobody has anything."""
    members = {name: one for name, one in workers.items() if one.loss is None}
    found = await _located(members.values(), lambda one: one.locate(model_path, model_id, describe=False))
    without = [name for name in loading if name in found and not found[name].has_file]
    if not without:
        return {}

    def describe(worker: WorkerHandle) -> Coroutine[None, None, WeightsFound]:
        told = partial(on_reading, worker.name)
        return worker.locate(model_path, model_id, describe=True, on_reading=told, stall_s=stall_s)

    holders = [members[name] for name, one in found.items() if one.has_file]
    found |= await _located(holders, describe)
    givers = _of_one_manifest(found)
    if not givers:
        return {}
    return {name: _sources(members[name], place, members, givers, links) for place, name in enumerate(without)}


async def tell_source(
    newcomer: WorkerHandle, workers: Collection[WorkerHandle], model_path: str, model_id: str
) -> None:
    """Tells those that fetch weights of one that has joined, where it has what they fetch: it may be one that they ask
    in vain, since it is elsewhere now."""
    fetching = [one for one in workers if one is not newcomer and _fetched(one)]
    if not fetching:
        return
    for located in (await _located([newcomer], lambda one: one.locate(model_path, model_id, describe=True))).values():
        source = WeightSource(newcomer.registration.address, newcomer.name)
        for worker in fetching:
            if located.manifest is not None and located.manifest == _fetched(worker):
                with suppress(WorkerError, DeadlineError):  # it is lost, or will be
                    async with deadline(f"telling worker {worker.name} of a source", _TELL_S):
                        await worker.say(AddWeightSource(located.manifest, source))


def _fetched(worker: WorkerHandle) -> str | None:
    """By its manifest: of what model a worker fetches weights."""
    order = worker.loading
    return None if order is None or order.weights is None else order.weights.manifest


def nearest_first(
    asker: str, names: Collection[str], hosts: Mapping[str, str], links: Links, place: int = 0
) -> list[str]:
    """Whom to ask for weights, by name: those of the asker's machine, then by what their links bring, the unknown ones
    last. Those that are alike are turned by `place`."""
    others = [name for name in names if name != asker]
    turned = others[place % max(len(others), 1) :] + others[: place % max(len(others), 1)]

    def distance(name: str) -> tuple[bool, float]:
        link = links.measured.get(frozenset((asker, name)))
        piece_s = inf if link is None else link.one_way_s + _PIECE_BYTES * link.byte_s
        return hosts[name] != hosts[asker], piece_s if link is None else round(log(1e3 * piece_s, _ALIKE))

    return sorted(turned, key=distance)


def file_is_away(workers: Mapping[str, WorkerHandle], model_id: str) -> bool:
    """Whether nobody who is here has the model's file, so that those who lack it must wait."""
    found = [one.found(model_id) for one in workers.values() if one.loss is None]
    return any(found) and not any(one is not None and one.has_file for one in found)


async def _located(
    workers: Collection[WorkerHandle], locate: Callable[[WorkerHandle], Coroutine[None, None, WeightsFound]]
) -> dict[str, WeightsFound]:
    """Without those that fail: they are none to ask."""
    asked = list(workers)
    answers = await asyncio.gather(*map(locate, asked), return_exceptions=True)
    found = {}
    for worker, answer in zip(asked, answers, strict=True):
        if isinstance(answer, WeightsFound):
            found[worker.name] = answer
        elif isinstance(answer, LlamaclustError):
            _log.warning("weights are not taken from worker %s: %s", worker.name, answer)
        else:
            raise answer
    return found


def _of_one_manifest(found: Mapping[str, WeightsFound]) -> dict[str, WeightsFound]:
    """Those that agree with most of those that have the file, or else of all; of as many, with the first."""
    described = {name: one for name, one in found.items() if one.manifest is not None}
    ordered = dict(sorted(described.items(), key=lambda item: not item[1].has_file))
    if not ordered:
        return {}
    told = [one.manifest for one in ordered.values() if one.has_file] or [one.manifest for one in ordered.values()]
    pinned = max(told, key=told.count)
    for name in (name for name, one in ordered.items() if one.manifest != pinned):
        _log.warning("weights are not taken from worker %s: its file has other tensors of the same model", name)
    return {name: one for name, one in ordered.items() if one.manifest == pinned}


def _sources(
    asker: WorkerHandle,
    place: int,
    members: Mapping[str, WorkerHandle],
    givers: Mapping[str, WeightsFound],
    links: Links,
) -> WeightSources:
    """Those with the file first, then the others, who may have fetched what it needs; of both those of its own machine
    first, then those that bring most. Of those that are alike each asker begins with another one."""
    hosts = {name: one.registration.host for name, one in members.items()}
    with_file = [name for name, one in givers.items() if one.has_file]
    ordered = [
        *nearest_first(asker.name, with_file, hosts, links, place),
        *nearest_first(asker.name, [name for name in members if name not in with_file], hosts, links, place),
    ]
    known = next(iter(givers.values()))
    assert known.manifest is not None
    sources = tuple(WeightSource(members[name].registration.address, name) for name in ordered)
    return WeightSources(known.manifest, known.manifest_bytes, sources)
