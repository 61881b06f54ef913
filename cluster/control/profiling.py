"""Profiles of workers: measured isolated and concurrently where workers share a machine, kept for the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
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
    config: ClusterConfig, model: Model, workers: Mapping[str, WorkerHandle], state_dir: Path, report: Report
) -> dict[str, Profile]:
    """By worker name. Keys of the cluster file come first, then what was measured on the same hardware before. A worker
    that is lost meanwhile has none, unless an equal one was measured."""
    stated = stated_speeds(config)
    members = {spec.name: workers[spec.name] for spec in config.workers if spec.name not in stated}
    keys = {name: _key(worker, workers, model.model_id) for name, worker in members.items()}
    known = read_profiles(state_dir)
    missing = [name for name, key in keys.items() if key not in known]
    if missing:
        report(Measuring(tuple(missing)))
        order = ProfileWorker(str(model.file.path), model.model_id)
        measuring = _Measuring({name: workers[name] for name in missing}, keys, order, report)
        new = await measuring.profiles()
        measured = [name for name in missing if keys[name] in new]
        hardware = {_key(workers[name], workers): new[keys[name]].map(DeviceProfile.without_steps) for name in measured}
        kept = {key: profile for key, profile in new.items() if key not in measuring.failed}  # the next start retries
        write_profiles(state_dir, hardware | kept)
        known |= new
    return stated | {name: known[key] for name, key in keys.items() if key in known}


def stated_speeds(config: ClusterConfig) -> dict[str, Profile]:
    """What the cluster file says itself, by worker name."""
    return {
        spec.name: Profile(DeviceProfile(spec.memory_bandwidth_gb_s * 1e9, spec.int8_gmac_s * 1e9))
        for spec in config.workers
        if spec.memory_bandwidth_gb_s is not None and spec.int8_gmac_s is not None
    }


def _key(worker: WorkerHandle, workers: Mapping[str, WorkerHandle], model_id: str = "") -> str:
    registration = worker.registration
    sharers = [other.registration for other in workers.values() if other.registration.machine == registration.machine]
    threads = sum(sharer.threads for sharer in sharers)
    return measurement_key(registration.fingerprint, len(sharers), threads, model_id)


@dataclass(frozen=True, slots=True, eq=False)
class _Measuring:
    """Of workers whose profiles are not known, by their keys."""

    _workers: Mapping[str, WorkerHandle]
    _keys: Mapping[str, str]
    _order: ProfileWorker
    _report: Report
    failed: set[str] = field(default_factory=set)  # keys of workers whose steps of the model could not be timed

    async def profiles(self) -> dict[str, Profile]:
        """By key. All concurrently first; then, of workers with equal keys on a shared machine, one isolated."""
        concurrent = await self._concurrent()
        found = _mean_profiles([self._keys[name] for name in concurrent], [*concurrent.values()])
        machines: dict[str, list[str]] = {}
        for name in concurrent:
            machines.setdefault(self._workers[name].registration.machine, []).append(name)
        shared = [names for names in machines.values() if len(names) > 1]
        for isolated in await asyncio.gather(*map(self._isolated, shared)):
            for key, times in isolated.items():
                found[key] = replace(found[key], cpu=replace(found[key].cpu, isolated=times))
        return found

    async def _concurrent(self) -> dict[str, Profile]:
        """By name, in the order of the workers; without step times where those could not be measured, and without
        workers that are lost."""
        workers = [*self._workers.values()]
        profiled = await asyncio.gather(*map(self._profile, workers))
        pairs = zip(workers, profiled, strict=True)
        found = await asyncio.gather(*(self._or_hardware(worker, profile) for worker, profile in pairs))
        return {worker.name: profile for worker, profile in zip(workers, found, strict=True) if profile is not None}

    async def _or_hardware(self, worker: WorkerHandle, profile: Profile | None) -> Profile | None:
        """The machine's alone where there is no profile; None where the worker is lost."""
        try:
            return profile or await profile_worker(worker, ProfileWorker())
        except LlamaclustError:
            if worker.loss is None:
                raise
            self._report(Notice(f"the start goes on without worker {worker.name}: {worker.error}"))
            return None

    async def _isolated(self, names: list[str]) -> dict[str, StepTimes]:
        """Step times by key, of one worker after the other on their machine."""
        first_of_key = {self._keys[name]: self._workers[name] for name in reversed(names)}
        isolated: dict[str, StepTimes] = {}
        for key, worker in first_of_key.items():
            if key not in self.failed and (profile := await self._profile(worker)) is not None:
                isolated[key] = profile.cpu.concurrent
        return isolated

    async def _profile(self, worker: WorkerHandle) -> Profile | None:
        """None, and a notice, where the model's steps could not be timed. None where the worker is lost."""
        try:
            return await profile_worker(worker, self._order)
        except LlamaclustError as error:
            if worker.loss is not None:
                return None
            self.failed.add(self._keys[worker.name])
            fallback = "plans use only its memory bandwidth and integer throughput"
            what = f"could not time the model's steps on worker {worker.name}; {fallback}"
            self._report(Notice(f"{what}: {error}"))
            return None


def _mean_profiles(keys: list[str], profiles: list[Profile]) -> dict[str, Profile]:
    """By key: equal workers of one machine get their mean, because their differences are noise."""
    groups: dict[str, list[Profile]] = {}
    for key, profile in zip(keys, profiles, strict=True):
        groups.setdefault(key, []).append(profile)
    return {key: mean_profile(group) for key, group in groups.items()}
