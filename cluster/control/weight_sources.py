"""Finds workers that can send a model, adapter or projector to workers that lack the file or have another version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, log

from llamaclust.cluster.control.remote.model_copies import OwnCopy, chosen_manifest, other_copies
from llamaclust.cluster.membership.worker_channel import SilentError
from llamaclust.cluster.membership.worker_handle import PROGRESS_TIMEOUT_S, WorkerHandle
from llamaclust.cluster.membership.worker_requests import find_weights
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.state.events import Notice, Report, WorkerReading
from llamaclust.core.errors import DeadlineError, LlamaclustError, WorkerError
from llamaclust.model.weights.file_manifests import FileManifest
from llamaclust.wire.control.weights import (
    AdapterFile,
    AddWeightSource,
    EncoderFile,
    FindWeights,
    FindWeightsProgress,
    WeightsFound,
    WeightSource,
    WeightSources,
)
from llamaclust.wire.rpc.deadlines import deadline

_log = logging.getLogger(__name__)

_PIECE_BYTES = 8e6
_ALIKE = 1.25
_ANNOUNCE_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelReference:
    path: str
    model_id: str


@dataclass(frozen=True, slots=True)
class WantedBytes:
    """A model, adapter or projector to load. If `is_compared` is set, all copies of the file are compared."""

    request: FindWeights
    own: OwnCopy | None = None
    is_compared: bool = False
    links: Links = UNKNOWN
    progress_timeout_s: float = PROGRESS_TIMEOUT_S


async def weight_sources(
    loading: Collection[str], workers: Mapping[str, WorkerHandle], wanted: WantedBytes, report: Report | None = None
) -> dict[str, WeightSources]:
    """Returns, for each connected worker in `loading`, the file's manifest and the machines that can send the file.
    Returns {} if all these workers have the same copy, or if no copy can be described."""
    members = {name: worker for name, worker in workers.items() if worker.loss is None}
    found = await _find(
        members.values(), lambda worker: find_weights(worker, wanted.request, None, wanted.progress_timeout_s)
    )
    if not _are_compared(wanted, [found[name] for name in loading if name in found]):
        return {}

    def describe(worker: WorkerHandle) -> Coroutine[None, None, WeightsFound]:
        def reading(progress: FindWeightsProgress) -> None:
            if report is not None:
                report(WorkerReading(worker.name, progress.done_bytes, progress.total_bytes))

        return find_weights(worker, described, reading, wanted.progress_timeout_s)

    described = replace(wanted.request, describe=True)
    holders = [members[name] for name, weights in found.items() if weights.has_file]
    answers, own = await asyncio.gather(_find(holders, describe), _own_manifest(wanted.own, found))
    found |= answers
    chosen = chosen_manifest(found, own)
    if chosen is None:
        return {}
    for text in other_copies(found, own, chosen, wanted.request.path):
        _log.error("%s", text)
        if report is not None:
            report(Notice(text))
    sources = {name: weights for name, weights in found.items() if weights.gives and weights.manifest == chosen.content}
    is_own = own is not None and own.content == chosen.content
    gives = wanted.own is not None and is_own and await wanted.own.gives(chosen.content)
    present = (name for name in loading if name in members)
    able = [name for name in present if sources or gives or (name in found and found[name].has_file)]
    here = [WeightSource()] if gives else []
    return {
        name: WeightSources(
            chosen.content, chosen.n_bytes, _sources(members[name], place, members, sources, here, wanted.links)
        )
        for place, name in enumerate(able)
    }


async def adapter_files(
    adapters: Mapping[int, WantedBytes], loading: Collection[str], workers: Mapping[str, WorkerHandle]
) -> dict[str, tuple[AdapterFile, ...]]:
    files: dict[str, tuple[AdapterFile, ...]] = dict.fromkeys(loading, ())
    for number, wanted in sorted(adapters.items()):
        sources = await weight_sources(loading, workers, wanted)
        file = AdapterFile(number, wanted.request.path, wanted.request.file_id)
        files = {name: (*found, replace(file, weights=sources.get(name))) for name, found in files.items()}
    return files


async def encoder_files(
    wanted: WantedBytes | None, loading: Collection[str], workers: Mapping[str, WorkerHandle], report: Report | None
) -> dict[str, EncoderFile]:
    if wanted is None or not loading:
        return {}
    sources = await weight_sources(loading, workers, wanted, report)
    file = EncoderFile(wanted.request.path, wanted.request.file_id)
    return {name: replace(file, weights=sources.get(name)) for name in loading}


def _are_compared(wanted: WantedBytes, found: Collection[WeightsFound]) -> bool:
    files = {weights.file for weights in found} | (set() if wanted.own is None else {wanted.own.file.copy_id})
    return wanted.is_compared or len(files) > 1 or not all(weights.has_file for weights in found)


async def _own_manifest(own: OwnCopy | None, found: Mapping[str, WeightsFound]) -> FileManifest | None:
    if own is None or any(weights.file == own.file.copy_id for weights in found.values()):
        return None
    try:
        return await own.manifest()
    except LlamaclustError as error:
        _log.warning("the coordinator's copy of the model is not compared with others: %s", error)
        return None


async def announce_source(newcomer: WorkerHandle, workers: Collection[WorkerHandle], request: FindWeights) -> None:
    fetching = [worker for worker in workers if worker is not newcomer and _fetched(worker)]
    if not fetching:
        return
    found = await _find([newcomer], lambda worker: find_weights(worker, replace(request, describe=True)))
    for weights in found.values():
        source = WeightSource(newcomer.registration.address, newcomer.name)
        for worker in fetching:
            if weights.manifest is not None and weights.manifest in _fetched(worker):
                with suppress(WorkerError, DeadlineError):  # The worker is lost or will count as lost soon.
                    async with deadline(f"announcing a source to worker {worker.name}", _ANNOUNCE_S):
                        await worker.channel.send(AddWeightSource(weights.manifest, source))


def _fetched(worker: WorkerHandle) -> set[str]:
    order = worker.loading
    files = () if order is None else (order, *order.adapters, order.encoder)
    weights = (file.weights for file in files if file is not None)
    return {fetched.manifest for fetched in weights if fetched is not None}


def nearest_first(
    fetcher: str, names: Collection[str], machines: Mapping[str, str], links: Links, place: int = 0
) -> list[str]:
    others = [name for name in names if name != fetcher]
    turned = others[place % max(len(others), 1) :] + others[: place % max(len(others), 1)]

    def distance(name: str) -> tuple[bool, float]:
        link = links.measured.get(frozenset((fetcher, name)))
        piece_s = inf if link is None else link.one_way_s + _PIECE_BYTES * link.byte_s
        return machines[name] != machines[fetcher], piece_s if link is None else round(log(1e3 * piece_s, _ALIKE))

    return sorted(turned, key=distance)


def is_file_absent(workers: Mapping[str, WorkerHandle], model_id: str) -> bool:
    """True if no connected worker is known to have the model's file."""
    found = [
        worker.weights_found.get((model_id, True)) or worker.weights_found.get((model_id, False))
        for worker in workers.values()
        if worker.loss is None
    ]
    return any(found) and not any(weights is not None and weights.has_file for weights in found)


async def _find(
    workers: Collection[WorkerHandle], find: Callable[[WorkerHandle], Coroutine[None, None, WeightsFound]]
) -> dict[str, WeightsFound]:
    answers = await asyncio.gather(*map(find, workers), return_exceptions=True)
    found = {}
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, WeightsFound):
            found[worker.name] = answer
        elif isinstance(answer, LlamaclustError):
            level = logging.DEBUG if isinstance(answer, SilentError) else logging.WARNING
            _log.log(level, "weights are not taken from worker %s: %s", worker.name, answer)
        else:
            raise answer
    return found


def _sources(
    fetcher: WorkerHandle,
    place: int,
    members: Mapping[str, WorkerHandle],
    described: Mapping[str, WeightsFound],
    coordinator: Sequence[WeightSource],
    links: Links,
) -> tuple[WeightSource, ...]:
    """Lists the sources for `fetcher`: workers with the file, the coordinator, and workers that may have parts."""
    machines = {name: worker.registration.machine for name, worker in members.items()}
    with_file = [name for name, weights in described.items() if weights.has_file]
    others = [name for name in members if name not in with_file] if described or coordinator else []
    first, last = (nearest_first(fetcher.name, names, machines, links, place) for names in (with_file, others))

    def source(name: str) -> WeightSource:
        return WeightSource(members[name].registration.address, name)

    return (*map(source, first), *coordinator, *map(source, last))
