"""Measures the speeds of workers, and stores them for the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.resources.resource_shares import measurement_key, most_similar_key
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import profile_worker
from llamaclust.cluster.state.events import Measuring, Notice, Report
from llamaclust.cluster.state.measurements import (
    MAX_PROFILES,
    LoadMeter,
    OtherLoad,
    disturbance,
    newest,
    read_other_loads,
    read_profiles,
    write_profiles,
)
from llamaclust.core.errors import DeadlineError, LlamaclustError
from llamaclust.core.profile import DeviceProfile, Profile, mean_profile
from llamaclust.model.loader import Model
from llamaclust.wire.control.profiles import ProfileWorker

MEASURED_AGAIN = "when it joins again, or at the next `llamaclust up`"


class WorkerProfiles:
    """Finds each worker's speed: in the cluster file, in stored profiles of equal hardware, or by a measurement."""

    def __init__(
        self, config: ClusterConfig, model: Model, state_dir: Path, report: Report, *, anew: bool = False
    ) -> None:
        self.stated = stated_speeds(config)
        self._model_id = model.model_id
        types = tuple(map(int, sorted({*model.quant_types, *model.widened.quant_types})))
        self._order = ProfileWorker(str(model.plain.path), model.model_id, 0, types)
        self._state_dir = state_dir
        self._report = report
        self._limit_s = config.timeouts.load
        # LoadMeter would count workers that are not child processes as other programs, so it is not used for them.
        self._has_own_processes = config.launcher_facts.is_local
        self._known = {} if anew else read_profiles(state_dir)  # Profiles by `measurement_key`.
        self._loads = {} if anew else read_other_loads(state_dir)  # Loads by other programs, by `measurement_key`.
        # Profiles by machine and its fingerprint. A worker's profile stays the same when other workers come and go.
        self._used: dict[tuple[str, str], Profile] = {}
        self._failures: dict[str, str] = {}  # Reasons of failed measurements, by worker name.

    def of(self, workers: Mapping[str, WorkerHandle]) -> dict[str, Profile]:
        found = {name: self._profile(worker, workers) for name, worker in workers.items()}
        return {name: profile for name, profile in found.items() if profile is not None}

    async def measure(self, names: Collection[str], workers: Mapping[str, WorkerHandle]) -> None:
        """Measures the workers in `names` that have no profile yet, all at once. The workers should be idle."""
        known = self.of(workers)
        missing = [name for name in names if name not in known and not workers[name].channel.is_silent]
        if missing:
            await self._measure(missing, workers)
        if note := disturbance(self.other_loads(names, workers).values()):
            self._report(Notice(note))

    def unknown_speeds(self, workers: Mapping[str, WorkerHandle]) -> str:
        """Says which speeds of a start's plan are unknown, why, and when they are measured again."""
        unmeasured = workers.keys() - self.of(workers).keys()
        reasons = (f"{name} ({self._failures.get(name, 'no measurement yet')})" for name in sorted(unmeasured))
        return f"could not be measured: {'; '.join(reasons) or 'some links'}; measured again {MEASURED_AGAIN}"

    def other_loads(self, names: Iterable[str], workers: Mapping[str, WorkerHandle]) -> dict[str, OtherLoad]:
        keys = {name: _key(workers[name], workers, self._model_id) for name in names if name not in self.stated}
        return {name: self._loads[key] for name, key in keys.items() if key in self._loads}

    def stored(self, workers: Mapping[str, WorkerHandle]) -> dict[str, Profile]:
        """Reads profiles from the state directory. Profiles that were measured with this model are preferred."""
        known = read_profiles(self._state_dir)
        keys = {
            name: [key for model_id in (self._model_id, "") if (key := _key(worker, workers, model_id)) in known]
            for name, worker in workers.items()
        }
        return {name: known[found[0]] for name, found in keys.items() if found}

    def estimate(self, workers: Mapping[str, WorkerHandle]) -> bool:
        """Estimates speeds from known profiles of equal hardware. Returns True if any worker now has a profile."""
        for worker in workers.values():
            similar = most_similar_key(_key(worker, workers, self._model_id), self._known)
            if similar is not None:
                self._used.setdefault(_hardware(worker), self._known[similar])
        return bool(self.of(workers))

    def _profile(self, worker: WorkerHandle, workers: Mapping[str, WorkerHandle]) -> Profile | None:
        if worker.name in self.stated:
            return self.stated[worker.name]
        hardware = _hardware(worker)
        if hardware not in self._used:
            if (known := self._known.get(_key(worker, workers, self._model_id))) is None:
                return None
            here = map(_hardware, workers.values())
            self._used = newest({**self._used, hardware: known}, here, MAX_PROFILES)
        return self._used[hardware]

    async def _measure(self, names: list[str], workers: Mapping[str, WorkerHandle]) -> None:
        keys = {name: _key(workers[name], workers, self._model_id) for name in names}
        measuring = _Measuring({name: workers[name] for name in names}, keys, self._order, self._report, self._limit_s)
        meter = LoadMeter()
        new = await measuring.profiles()
        self._failures |= measuring.errors
        load = meter.measure() if self._has_own_processes else None
        self._known = newest(self._known | new, new, MAX_PROFILES)
        self._loads |= {} if load is None else dict.fromkeys(new, load)
        # Profiles with failed measurements are not stored, so that the next start measures again.
        kept = {key: profile for key, profile in new.items() if key not in measuring.failed}
        measured = {name: new[keys[name]].map(DeviceProfile.without_steps) for name in names if keys[name] in new}
        hardware = {_key(workers[name], workers): profile for name, profile in measured.items()}
        known = read_profiles(self._state_dir)  # Other models may have stored times of matrix products.
        hardware = {key: profile.with_other_products(known.get(key, profile)) for key, profile in hardware.items()}
        busy = {worker.registration.machine for worker in workers.values() if worker.stages}
        if not any(workers[name].registration.machine in busy for name in measured):
            write_profiles(self._state_dir, hardware | kept, load)


def report_losses(workers: Iterable[WorkerHandle], what: str, report: Report) -> None:
    for worker in workers:
        if worker.loss is not None:
            report(Notice(f"{what} continues without worker {worker.name}: {worker.error}"))


def stated_speeds(config: ClusterConfig) -> dict[str, Profile]:
    return {
        spec.name: Profile(DeviceProfile(spec.memory_bandwidth_gb_s * 1e9, spec.int8_gmac_s * 1e9))
        for spec in config.workers
        if spec.memory_bandwidth_gb_s is not None and spec.int8_gmac_s is not None
    }


def _hardware(worker: WorkerHandle) -> tuple[str, str]:
    return worker.registration.machine, worker.registration.fingerprint


def _key(worker: WorkerHandle, workers: Mapping[str, WorkerHandle], model_id: str = "") -> str:
    registration = worker.registration
    sharers = [other.registration for other in workers.values() if other.registration.machine == registration.machine]
    threads = sum(sharer.threads for sharer in sharers)
    return measurement_key(registration.fingerprint, len(sharers), threads, model_id)


@dataclass(frozen=True, slots=True, eq=False)
class _Measuring:
    _workers: Mapping[str, WorkerHandle]
    _keys: Mapping[str, str]
    _order: ProfileWorker
    _report: Report
    _limit_s: float
    _silent: set[str] = field(default_factory=set)  # Names of workers that did not answer in time.
    errors: dict[str, str] = field(default_factory=dict)  # Errors of workers without any profile, by name.
    failed: set[str] = field(default_factory=set)  # Keys of workers on which the model's steps could not be timed.

    async def profiles(self) -> dict[str, Profile]:
        """Measures all workers together and then, on shared machines, single workers while the others are idle."""
        what = "memory bandwidth, matrix products, steps of the model"
        self._report(Measuring(tuple(self._workers), what))
        concurrent = await self._concurrent()
        found = _mean_profiles([self._keys[name] for name in concurrent], [*concurrent.values()])
        machines: dict[str, list[str]] = {}
        for name in concurrent:
            machines.setdefault(self._workers[name].registration.machine, []).append(name)
        shared = [names for names in machines.values() if len(names) > 1]
        for isolated in await asyncio.gather(*map(self._isolated, shared)):
            for key, cpu in isolated.items():
                found[key] = replace(found[key], cpu=found[key].cpu.beside(cpu))
        return found

    async def _concurrent(self) -> dict[str, Profile]:
        workers = [*self._workers.values()]
        profiled = await asyncio.gather(*map(self._profile, workers))
        pairs = zip(workers, profiled, strict=True)
        found = await asyncio.gather(*(self._or_hardware(worker, profile) for worker, profile in pairs))
        return {worker.name: profile for worker, profile in zip(workers, found, strict=True) if profile is not None}

    async def _or_hardware(self, worker: WorkerHandle, profile: Profile | None) -> Profile | None:
        if profile is not None or worker.name in self._silent:
            return profile
        try:
            return await profile_worker(worker, ProfileWorker(quant_types=self._order.quant_types), self._limit_s)
        except LlamaclustError as error:
            if worker.loss is None:
                self._report_unmeasured(worker, error)
            return None

    def _report_unmeasured(self, worker: WorkerHandle, error: LlamaclustError) -> None:
        limit = " (timeouts.load)" if isinstance(error, DeadlineError) else ""
        self.errors[worker.name] = f"{error}{limit}"
        consequence = "plans treat all workers as equally fast, or use it only if the other workers do not suffice"
        again = f"it is measured again {MEASURED_AGAIN}"
        self._report(Notice(f"worker {worker.name} is not measured: {error}{limit}; {consequence}; {again}"))

    async def _isolated(self, names: list[str]) -> dict[str, DeviceProfile]:
        first_of_key = {self._keys[name]: self._workers[name] for name in reversed(names)}
        isolated: dict[str, DeviceProfile] = {}
        for key, worker in first_of_key.items():
            self._report(Measuring((worker.name,), "speeds again, while the machine's other workers are idle"))
            profile = None if key in self.failed else await self._profile(worker)
            if (profile := await self._or_hardware(worker, profile)) is not None:
                isolated[key] = profile.cpu
        return isolated

    async def _profile(self, worker: WorkerHandle) -> Profile | None:
        try:
            return await profile_worker(worker, self._order, self._limit_s)
        except LlamaclustError as error:
            if worker.loss is not None:
                return None
            if isinstance(error, DeadlineError):
                self._silent.add(worker.name)
                self._report_unmeasured(worker, error)
                return None
            self.failed.add(self._keys[worker.name])
            fallback = "plans use its matrix product times instead"
            what = f"could not time the model's steps on worker {worker.name}; {fallback}"
            self._report(Notice(f"{what}: {error}"))
            return None


def _mean_profiles(keys: list[str], profiles: list[Profile]) -> dict[str, Profile]:
    groups: dict[str, list[Profile]] = {}
    for key, profile in zip(keys, profiles, strict=True):
        groups.setdefault(key, []).append(profile)
    return {key: mean_profile(group) for key, group in groups.items()}
