"""What workers reach on their machines: measured together where they share one, and kept for the next start."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from statistics import fmean

from llamaclust.cluster.config import ClusterConfig, WorkerConfig
from llamaclust.cluster.state import ClusterDir, Measurement
from llamaclust.cluster.worker_handle import WorkerHandle


async def measure_workers(
    config: ClusterConfig, workers: Mapping[str, WorkerHandle], folder: ClusterDir
) -> dict[str, Measurement]:
    """By worker name. Keys of the cluster file come first, then what was measured on the same hardware before."""
    company = Counter(worker.registration.host for worker in workers.values())
    kept = folder.read_measurements()
    found: dict[str, Measurement] = {}
    for spec in config.workers:
        registration = workers[spec.name].registration
        fingerprint = f"{registration.fingerprint}, {company[registration.host]} workers"
        stated = _stated(spec, fingerprint)
        if stated is not None:
            found[spec.name] = stated
        elif spec.name in kept and kept[spec.name].fingerprint == fingerprint:
            found[spec.name] = kept[spec.name]
    missing = [spec.name for spec in config.workers if spec.name not in found]
    answers = await asyncio.gather(*(workers[name].measure() for name in missing))
    for name, answer in zip(missing, answers, strict=True):
        registration = workers[name].registration
        fingerprint = f"{registration.fingerprint}, {company[registration.host]} workers"
        found[name] = Measurement(fingerprint, answer.read_bytes_s / 1e9, answer.int8_macs_s / 1e9)
    found |= _evened(
        {name: found[name] for name in missing}, {name: workers[name].registration.host for name in missing}
    )
    folder.write_measurements(found)
    return found


def _evened(measured: dict[str, Measurement], hosts: dict[str, str]) -> dict[str, Measurement]:
    """Workers that are alike and share a machine get their mean: what tells them apart is noise."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for name, one in measured.items():
        groups.setdefault((hosts[name], one.fingerprint), []).append(one)
    return {name: _mean(groups[hosts[name], one.fingerprint]) for name, one in measured.items()}


def _mean(group: list[Measurement]) -> Measurement:
    read_gb_s = fmean(one.read_gb_s for one in group)
    return Measurement(group[0].fingerprint, read_gb_s, fmean(one.int8_gmac_s for one in group))


def _stated(spec: WorkerConfig, fingerprint: str) -> Measurement | None:
    if spec.bandwidth is None or spec.int8 is None:
        return None
    return Measurement(fingerprint, spec.bandwidth, spec.int8)
