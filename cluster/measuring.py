"""What workers reach on their machines: measured together where they share one, and kept for the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from llamaclust.cluster.config import ClusterConfig
from llamaclust.cluster.events import Measuring, Watch
from llamaclust.cluster.shares import measurement_key
from llamaclust.cluster.state import Measurement, read_measurements, write_measurements
from llamaclust.cluster.worker_handle import WorkerHandle


async def measure_workers(
    config: ClusterConfig, workers: Mapping[str, WorkerHandle], state_dir: Path, watch: Watch
) -> dict[str, Measurement]:
    """By worker name. Keys of the cluster file come first, then what was measured on the same hardware before."""
    stated = stated_speeds(config)
    keys = {spec.name: _key(spec.name, workers) for spec in config.workers if spec.name not in stated}
    known = read_measurements(state_dir)
    missing = [name for name, key in keys.items() if key not in known]
    if missing:
        watch(Measuring(tuple(missing)))
        measured = await asyncio.gather(*(_measure(workers[name]) for name in missing))
        new = _evened([keys[name] for name in missing], measured)
        write_measurements(state_dir, new)
        known |= new
    return stated | {name: known[key] for name, key in keys.items()}


def stated_speeds(config: ClusterConfig) -> dict[str, Measurement]:
    """What the cluster file says itself, by worker name."""
    return {
        spec.name: Measurement(spec.bandwidth, spec.int8)
        for spec in config.workers
        if spec.bandwidth is not None and spec.int8 is not None
    }


def _key(name: str, workers: Mapping[str, WorkerHandle]) -> str:
    one = workers[name].registration
    company = [other.registration for other in workers.values() if other.registration.host == one.host]
    return measurement_key(one.fingerprint, len(company), sum(other.threads for other in company))


async def _measure(worker: WorkerHandle) -> Measurement:
    answer = await worker.measure()
    return Measurement(answer.read_bytes_s / 1e9, answer.int8_macs_s / 1e9)


def _evened(keys: list[str], measured: list[Measurement]) -> dict[str, Measurement]:
    """Workers that are alike and share a machine get their mean: what tells them apart is noise."""
    groups: dict[str, list[Measurement]] = {}
    for key, one in zip(keys, measured, strict=True):
        groups.setdefault(key, []).append(one)
    return {key: _mean(group) for key, group in groups.items()}


def _mean(group: list[Measurement]) -> Measurement:
    return Measurement(fmean(one.read_gb_s for one in group), fmean(one.int8_gmac_s for one in group))
