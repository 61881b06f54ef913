"""Sources of a model's weights, for workers of a plan without its file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf, log

from llamaclust.cluster.membership.worker_handle import PROGRESS_TIMEOUT_S, WorkerHandle
from llamaclust.cluster.membership.worker_requests import find_weights
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.state.events import Report, WorkerReading
from llamaclust.core.errors import DeadlineError, LlamaclustError, WorkerError
from llamaclust.wire.control import messages
from llamaclust.wire.control.messages import FindWeights, FindWeightsProgress, WeightsFound, WeightSource, WeightSources
from llamaclust.wire.rpc.deadlines import deadline

_log = logging.getLogger(__name__)

_PIECE_BYTES = 8e6
"""Weights are sent in pieces of this size."""
_ALIKE = 1.25
"""Links that differ by less count as equal."""
_ANNOUNCE_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model as messages name it."""

    path: str
    model_id: str
    adapter_paths: tuple[str, ...] = ()

    def request(self, *, describe: bool) -> FindWeights:
        return FindWeights(self.path, self.model_id, describe, adapter_paths=self.adapter_paths)


async def weight_sources(
    loading: Collection[str],
    workers: Mapping[str, WorkerHandle],
    model: ModelReference,
    *,
    links: Links = UNKNOWN,
    report: Report | None = None,
    progress_timeout_s: float = PROGRESS_TIMEOUT_S,
) -> dict[str, WeightSources]:
    """The sources of each worker in `loading` without the file; workers with the file are left out, and so are all
    where there is no source."""
    members = {name: worker for name, worker in workers.items() if worker.loss is None}
    found = await _find(members.values(), lambda worker: find_weights(worker, model.request(describe=False)))
    without = [name for name in loading if name in found and not found[name].has_file]
    if not without:
        return {}

    def describe(worker: WorkerHandle) -> Coroutine[None, None, WeightsFound]:
        def reading(progress: FindWeightsProgress) -> None:
            if report is not None:
                report(WorkerReading(worker.name, progress.done_bytes, progress.total_bytes))

        return find_weights(worker, model.request(describe=True), reading, progress_timeout_s)

    holders = [members[name] for name, weights in found.items() if weights.has_file]
    found |= await _find(holders, describe)
    sources = _of_one_manifest(found)
    if not sources:
        return {}
    return {name: _sources(members[name], place, members, sources, links) for place, name in enumerate(without)}


async def announce_source(newcomer: WorkerHandle, workers: Collection[WorkerHandle], model: ModelReference) -> None:
    """Workers that fetch weights which the newcomer has may fetch them there: it may be a source that they know under
    an old address."""
    fetching = [worker for worker in workers if worker is not newcomer and _fetched(worker)]
    if not fetching:
        return
    found = await _find([newcomer], lambda worker: find_weights(worker, model.request(describe=True)))
    for weights in found.values():
        source = WeightSource(newcomer.registration.address, newcomer.name)
        for worker in fetching:
            if weights.manifest is not None and weights.manifest == _fetched(worker):
                with suppress(WorkerError, DeadlineError):  # it is lost, or will be
                    async with deadline(f"announcing a source to worker {worker.name}", _ANNOUNCE_S):
                        await worker.channel.send(messages.AddWeightSource(weights.manifest, source))


def _fetched(worker: WorkerHandle) -> str | None:
    """The manifest of the weights that a worker fetches."""
    order = worker.loading
    return None if order is None or order.weights is None else order.weights.manifest


def nearest_first(
    fetcher: str, names: Collection[str], machines: Mapping[str, str], links: Links, place: int = 0
) -> list[str]:
    """Sources by name: first those on the fetcher's machine, then by link speed, unknown links last. Equal ones are
    rotated by `place`."""
    others = [name for name in names if name != fetcher]
    turned = others[place % max(len(others), 1) :] + others[: place % max(len(others), 1)]

    def distance(name: str) -> tuple[bool, float]:
        link = links.measured.get(frozenset((fetcher, name)))
        piece_s = inf if link is None else link.one_way_s + _PIECE_BYTES * link.byte_s
        return machines[name] != machines[fetcher], piece_s if link is None else round(log(1e3 * piece_s, _ALIKE))

    return sorted(turned, key=distance)


def is_file_absent(workers: Mapping[str, WorkerHandle], model_id: str) -> bool:
    """Whether no present worker has the model's file, so that the others must wait."""
    found = [
        worker.weights_found.get((model_id, True)) or worker.weights_found.get((model_id, False))
        for worker in workers.values()
        if worker.loss is None
    ]
    return any(found) and not any(weights is not None and weights.has_file for weights in found)


async def _find(
    workers: Collection[WorkerHandle], find: Callable[[WorkerHandle], Coroutine[None, None, WeightsFound]]
) -> dict[str, WeightsFound]:
    """Workers that fail are no sources."""
    answers = await asyncio.gather(*map(find, workers), return_exceptions=True)
    found = {}
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, WeightsFound):
            found[worker.name] = answer
        elif isinstance(answer, LlamaclustError):
            _log.warning("weights are not taken from worker %s: %s", worker.name, answer)
        else:
            raise answer
    return found


def _of_one_manifest(found: Mapping[str, WeightsFound]) -> dict[str, WeightsFound]:
    """Workers with the manifest of most workers that have the file, or else of all; of equally many, the first."""
    described = {name: weights for name, weights in found.items() if weights.manifest is not None}
    ordered = dict(sorted(described.items(), key=lambda item: not item[1].has_file))
    if not ordered:
        return {}
    of_files = [weights.manifest for weights in ordered.values() if weights.has_file]
    manifests = of_files or [weights.manifest for weights in ordered.values()]
    pinned = max(manifests, key=manifests.count)
    for name in (name for name, weights in ordered.items() if weights.manifest != pinned):
        _log.warning("weights are not taken from worker %s: its file has other tensors of the same model", name)
    return {name: weights for name, weights in ordered.items() if weights.manifest == pinned}


def _sources(
    fetcher: WorkerHandle,
    place: int,
    members: Mapping[str, WorkerHandle],
    described: Mapping[str, WeightsFound],
    links: Links,
) -> WeightSources:
    """Workers with the file first, then the others, which may have fetched it; both nearest first. Each fetcher begins
    with another one of equal sources."""
    machines = {name: worker.registration.machine for name, worker in members.items()}
    with_file = [name for name, weights in described.items() if weights.has_file]
    ordered = [
        *nearest_first(fetcher.name, with_file, machines, links, place),
        *nearest_first(fetcher.name, [name for name in members if name not in with_file], machines, links, place),
    ]
    known = next(iter(described.values()))
    assert known.manifest is not None
    sources = tuple(WeightSource(members[name].registration.address, name) for name in ordered)
    return WeightSources(known.manifest, known.manifest_bytes, sources)
