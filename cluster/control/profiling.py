"""What workers reach on their machines and with the model: measured alone and together where they share one, and kept
for the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.notices import not_profiled_text
from llamaclust.cluster.control.resource_shares import measurement_key
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import profile_worker
from llamaclust.cluster.state.directory import read_profiles, write_profiles
from llamaclust.cluster.state.events import Measuring, Notice, Report
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.profile import DeviceProfile, Profile, StepTimes, mean_profile
from llamaclust.model.loader import Model
from llamaclust.wire.control.profiles import ProfileWorker


async def measure_workers(
    config: ClusterConfig, model: Model, workers: Mapping[str, WorkerHandle], state_dir: Path, watch: Report
) -> dict[str, Profile]:
    """By worker name. Keys of the cluster file come first, then what was measured on the same hardware before."""
    stated = stated_speeds(config)
    members = {spec.name: workers[spec.name] for spec in config.workers if spec.name not in stated}
    keys = {name: _key(worker, workers, model.model_id) for name, worker in members.items()}
    known = read_profiles(state_dir)
    missing = [name for name, key in keys.items() if key not in known]
    if missing:
        watch(Measuring(tuple(missing)))
        order = ProfileWorker(str(model.file.path), model.model_id)
        measuring = _Measuring({name: workers[name] for name in missing}, keys, order, watch)
        new = await measuring.run()
        untried = {_key(workers[name], workers): new[keys[name]].map(DeviceProfile.without_steps) for name in missing}
        kept = {key: one for key, one in new.items() if key not in measuring.failed}  # those are tried again next time
        write_profiles(state_dir, untried | kept)
        known |= new
    return stated | {name: known[key] for name, key in keys.items()}


def stated_speeds(config: ClusterConfig) -> dict[str, Profile]:
    """What the cluster file says itself, by worker name."""
    return {
        spec.name: Profile(DeviceProfile(spec.memory_bandwidth_gb_s * 1e9, spec.int8_gmac_s * 1e9))
        for spec in config.workers
        if spec.memory_bandwidth_gb_s is not None and spec.int8_gmac_s is not None
    }


def _key(worker: WorkerHandle, workers: Mapping[str, WorkerHandle], model_id: str = "") -> str:
    one = worker.registration
    company = [other.registration for other in workers.values() if other.registration.host == one.host]
    return measurement_key(one.fingerprint, len(company), sum(other.threads for other in company), model_id)


class _Measuring:
    """Of workers whose figures are not known, by their keys."""

    def __init__(
        self, workers: Mapping[str, WorkerHandle], keys: Mapping[str, str], order: ProfileWorker, watch: Report
    ) -> None:
        self._workers = workers
        self._keys = keys
        self._order = order
        self._watch = watch
        self.failed: set[str] = set()  # keys of workers that could not try steps of the model

    async def run(self) -> dict[str, Profile]:
        """By key. All together first; then, of those that are alike and share a machine, one alone."""
        found = _evened([self._keys[name] for name in self._workers], await self._together())
        machines: dict[str, list[str]] = {}
        for name, worker in self._workers.items():
            machines.setdefault(worker.registration.host, []).append(name)
        shared = [company for company in machines.values() if len(company) > 1]
        for isolated in await asyncio.gather(*map(self._each_alone, shared)):
            for key, times in isolated.items():
                found[key] = replace(found[key], cpu=replace(found[key].cpu, isolated=times))
        return found

    async def _together(self) -> list[Profile]:
        """In the order of the workers; of those that failed to try steps of the model, of their machines alone."""
        tried = await asyncio.gather(*map(self._try, self._workers.values()))
        without = [name for name, one in zip(self._workers, tried, strict=True) if one is None]
        plain = await asyncio.gather(*(profile_worker(self._workers[name], ProfileWorker()) for name in without))
        machines = dict(zip(without, plain, strict=True))
        return [one or machines[name] for name, one in zip(self._workers, tried, strict=True)]

    async def _each_alone(self, names: list[str]) -> dict[str, StepTimes]:
        one_of_each = {self._keys[name]: self._workers[name] for name in reversed(names)}
        isolated: dict[str, StepTimes] = {}
        for key, worker in one_of_each.items():
            if key not in self.failed and (measured := await self._try(worker)) is not None:
                isolated[key] = measured.cpu.concurrent
        return isolated

    async def _try(self, worker: WorkerHandle) -> Profile | None:
        """None, and a line that says so, where steps of the model could not be tried. WorkerError where it is lost."""
        try:
            return await profile_worker(worker, self._order)
        except LlamaclustError as error:
            if worker.loss is not None:
                raise
            self.failed.add(self._keys[worker.name])
            self._watch(Notice(not_profiled_text(worker.name, error)))
            return None


def _evened(keys: list[str], profiles: list[Profile]) -> dict[str, Profile]:
    """Workers that are alike and share a machine get their mean: what tells them apart is noise."""
    groups: dict[str, list[Profile]] = {}
    for key, profile in zip(keys, profiles, strict=True):
        groups.setdefault(key, []).append(profile)
    return {key: mean_profile(group) for key, group in groups.items()}
