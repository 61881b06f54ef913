"""Finds out who has a model's weights, for those workers of a plan that have not its file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from llamaclust.cluster.worker_handle import WorkerHandle
from llamaclust.errors import LlamaclustError
from llamaclust.wire.control import Located, WeightSource, WeightSources

_log = logging.getLogger(__name__)

_SINCE = (2, 2)
"""The first version of the protocol whose workers answer."""


async def weight_sources(
    loading: Collection[str], workers: Mapping[str, WorkerHandle], model_path: str, model_id: str
) -> dict[str, WeightSources]:
    """For each of the workers in `loading` that has not the file, whom to ask for its layers; workers that have it are
    left out, and so are all where nobody has anything."""
    members = {name: one for name, one in workers.items() if one.loss is None and one.registration.protocol >= _SINCE}
    found = await _located(members.values(), model_path, model_id, describe=False)
    without = [name for name in loading if name in found and not found[name].has_file]
    if not without:
        return {}
    holders = [members[name] for name, one in found.items() if one.has_file]
    found |= await _located(holders, model_path, model_id, describe=True)
    givers = _of_one_manifest(found)
    if not givers:
        return {}
    return {name: _sources(members[name], place, members, givers) for place, name in enumerate(without)}


async def _located(
    workers: Collection[WorkerHandle], model_path: str, model_id: str, *, describe: bool
) -> dict[str, Located]:
    """Without those that fail: they are none to ask."""
    asked = list(workers)
    answers = await asyncio.gather(
        *(worker.locate(model_path, model_id, describe=describe) for worker in asked), return_exceptions=True
    )
    found = {}
    for worker, answer in zip(asked, answers, strict=True):
        if isinstance(answer, Located):
            found[worker.name] = answer
        elif isinstance(answer, LlamaclustError):
            _log.warning("weights are not taken from worker %s: %s", worker.name, answer)
        else:
            raise answer
    return found


def _of_one_manifest(found: Mapping[str, Located]) -> dict[str, Located]:
    """Those that agree with the first of those that have the file, or else with the first of all."""
    described = {name: one for name, one in found.items() if one.manifest is not None}
    ordered = dict(sorted(described.items(), key=lambda item: not item[1].has_file))
    if not ordered:
        return {}
    pinned = next(iter(ordered.values())).manifest
    for name in (name for name, one in ordered.items() if one.manifest != pinned):
        _log.warning("weights are not taken from worker %s: its file has other tensors of the same model", name)
    return {name: one for name, one in ordered.items() if one.manifest == pinned}


def _sources(
    asker: WorkerHandle, place: int, members: Mapping[str, WorkerHandle], givers: Mapping[str, Located]
) -> WeightSources:
    """Those with the file first, of them those of its own machine; then the others, who may have fetched what it needs.
    Each asker begins with another one."""
    others = [name for name in members if name != asker.name]
    with_file = [name for name, one in givers.items() if one.has_file and name != asker.name]
    with_file = with_file[place % max(len(with_file), 1) :] + with_file[: place % max(len(with_file), 1)]
    with_file.sort(key=lambda name: members[name].registration.host != asker.registration.host)
    ordered = [*with_file, *(name for name in others if name not in with_file)]
    known = next(iter(givers.values()))
    assert known.manifest is not None
    sources = tuple(WeightSource(members[name].registration.address, name) for name in ordered)
    return WeightSources(known.manifest, known.manifest_bytes, sources)
