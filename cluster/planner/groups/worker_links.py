"""Divides classes of equal workers further, so that all workers of a class have equal links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.splits.holders import WorkerClass

_NOISE = 0.25
_NOISE_S = 3e-5


def split_by_links(worker_class: WorkerClass, workers: Sequence[WorkerFacts], links: Links) -> list[WorkerClass]:
    parts: list[list[int]] = []
    for worker in worker_class.workers:
        part = next((part for part in parts if _are_alike(worker, part[0], workers, links)), None)
        if part is None:
            parts.append([worker])
        else:
            part.append(worker)
    return [replace(worker_class, workers=tuple(part)) for part in parts]


def _are_alike(one: int, other: int, workers: Sequence[WorkerFacts], links: Links) -> bool:
    names = [workers[worker].name for worker in (one, other)]
    others = (worker.name for worker in workers if worker.name not in names)
    return all(_have_equal_links(names, name, links) for name in others)


def _have_equal_links(names: Sequence[str], to: str, links: Links) -> bool:
    first, second = (links.between(name, to) for name in names)
    if not all(links.are_known((name, to)) for name in names):
        return links.are_known((names[0], to)) == links.are_known((names[1], to))
    latencies, byte_s = (first.gather_s, second.gather_s), (first.byte_s, second.byte_s)
    return max(latencies) - min(latencies) <= max(_NOISE_S, _NOISE * max(latencies)) and max(byte_s) - min(
        byte_s
    ) <= _NOISE * max(byte_s)
