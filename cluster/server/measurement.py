"""Measures local workers and their links for `llamaclust measure`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import model_costs
from llamaclust.cluster.control.planning import in_order
from llamaclust.cluster.control.resources.link_profiling import stored_links
from llamaclust.cluster.control.resources.profiling import WorkerProfiles, report_losses
from llamaclust.cluster.launchers.worker_settings import worker_settings
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.links import COORDINATOR, Links
from llamaclust.cluster.server.start import launching, link_meter, open_models, registry_of
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Report
from llamaclust.cluster.state.measurements import OtherLoad
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.model.loader import Model
from llamaclust.wire.rpc.sched_slice import short_slices

_PROMPT_ROWS = 128
_Values = Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    unit: str
    measured: float
    stored: float | None

    @property
    def ratio(self) -> float | None:
        return self.measured / self.stored if self.stored else None


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    name: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    name: str
    devices: tuple[MeasuredPart, ...]
    missing: tuple[str, ...]  # Workers that could not be measured, and workers whose speeds are in the cluster file.
    other_loads: Mapping[str, OtherLoad]  # Load of other programs during the measurement, by worker.


@dataclass(frozen=True, slots=True)
class Measurements:
    models: tuple[MeasuredModel, ...]
    links: tuple[MeasuredPart, ...]  # Measured links between workers. Empty if plans assume default links.


async def measure_workers(
    config: ClusterConfig, paths: Sequence[Path], folder: ClusterDir, report: Report
) -> Measurements:
    """Starts and measures the cluster's workers, and stores the results. The caller holds the lock of `folder`."""
    async with AsyncExitStack() as stack:
        stack.enter_context(short_slices())
        launcher = stack.enter_context(launching(config, folder, report))
        registry = registry_of(config, launcher, ControlRecord.begin(folder.control))
        config, models = await open_models(stack, config, paths, launcher, report)
        await stack.enter_async_context(launcher)
        await stack.enter_async_context(registry)
        await launcher.start(worker_settings(config), registry.address, registry.process_exited)
        await launcher.joined(registry, _no_shortfall)
        present, state_dir = registry.present, folder.path.parent
        workers = {name: present[name] for name in in_order(config, present)}
        found = [await _measured(own, model, workers, state_dir, report) for own, model in models]
        profiles = {name: profile for _, of in found for name, profile in of.items()}
        meter = link_meter(config, profiles, launcher, folder, report, anew=True)
        stored = stored_links(workers, state_dir)
        links = () if meter is None else tuple(_links(await meter(workers), stored))
        report_losses(workers.values(), "the measurement", report)
        return Measurements(tuple(each for each, _ in found), links)


async def _no_shortfall(_: bool) -> None:
    pass  # The launcher of local workers waits for all workers, so none can be missing.


async def _measured(
    config: ClusterConfig, model: Model, workers: Mapping[str, WorkerHandle], state_dir: Path, report: Report
) -> tuple[MeasuredModel, Mapping[str, Profile]]:
    profiles = WorkerProfiles(config, model, state_dir, report, anew=True)
    stored = profiles.stored(workers)
    await profiles.measure(workers, workers)
    found = profiles.of(workers)
    loads = profiles.other_loads(workers, workers)
    measured = {name: profile for name, profile in found.items() if name not in profiles.stated}
    costs = StageCosts.of(model_costs(config, model))
    devices = tuple(
        device
        for name, profile in measured.items()
        for device in _devices(workers[name], profile, stored.get(name), costs)
    )
    missing = tuple(name for name in workers if name not in measured)
    return MeasuredModel(config.model_name, devices, missing, loads), found


def _devices(
    worker: WorkerHandle, measured: Profile, stored: Profile | None, costs: StageCosts
) -> Iterator[MeasuredPart]:
    before = None if stored is None else stored.cpu
    yield MeasuredPart(worker.name, _figures(_values(measured.cpu, costs), _values(before, costs)))
    known = () if stored is None else stored.gpus
    for number, (gpu, profile) in enumerate(zip(worker.registration.gpus, measured.gpus, strict=False)):
        before = known[number] if number < len(known) else None
        yield MeasuredPart(f"{worker.name} {gpu.device}", _figures(_values(profile, costs), _values(before, costs)))


def _values(profile: DeviceProfile | None, costs: StageCosts) -> _Values:
    if profile is None:
        return {}
    values = {
        ("memory bandwidth", "GB/s"): profile.read_bytes_s / 1e9,
        ("integer products", "GMAC/s"): profile.int8_macs_s / 1e9,
    }
    if profile.concurrent:
        facts = WorkerFacts("", None, profile)
        values["decode, all layers", "ms"] = 1e3 * costs.decode_s(facts, 0, costs.layers)
        prompt_s = costs.prefill_s(facts, 0, costs.layers, _PROMPT_ROWS)
        values[f"prefill of {_PROMPT_ROWS} tokens, all layers", "ms"] = 1e3 * prompt_s
    return values


def _links(measured: Links, stored: Links) -> Iterator[MeasuredPart]:
    for pair, link in measured.measured.items():
        known = stored.measured.get(pair)
        before = {} if known is None else _link_values(known.one_way_s, known.byte_s)
        ends = " - ".join(name if name != COORDINATOR else "coordinator" for name in sorted(pair))
        yield MeasuredPart(ends, _figures(_link_values(link.one_way_s, link.byte_s), before))


def _link_values(one_way_s: float, byte_s: float) -> _Values:
    return {("latency, one way", "ms"): 1e3 * one_way_s, ("throughput", "GB/s"): 1e-9 / byte_s}


def _figures(measured: _Values, stored: _Values) -> tuple[Figure, ...]:
    return tuple(Figure(*place, value, stored.get(place)) for place, value in measured.items())
