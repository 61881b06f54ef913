"""Tests of measurements of workers: known hardware is not measured again, and a start goes on without step times."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.pool.newcomers import Newcomers
from llamaclust.cluster.control.resources import profiling
from llamaclust.cluster.control.resources.profiling import WorkerProfiles, report_losses
from llamaclust.cluster.control.resources.resource_shares import (
    WorkerResources,
    machine_shares,
    measurement_key,
    most_similar_key,
)
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import (
    profile_worker,
    refresh_memory,
)
from llamaclust.cluster.state import measurements
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.cluster.state.measurements import LoadMeter, OtherLoad, read_profiles
from llamaclust.core.errors import ProtocolError
from llamaclust.core.gpus import Gpu
from llamaclust.core.profile import DeviceProfile, ProductTime, Profile, StepTime
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.control.messages import (
    CoordinatorMessage,
    Failure,
    Heartbeat,
    Loaded,
    RequestFailed,
    WorkerMessage,
)
from llamaclust.wire.control.profiles import ProfileWorker, WorkerProfile
from support.several_models.runner import ANYTHING
from support.wire.control_messages import LOAD, REGISTER
from support.wire.worker_handles import handle_of


class Machines:
    """Simulated workers a and b of one machine, with their answers to an order to profile a model's steps."""

    def __init__(self, **answers: WorkerMessage | str | None) -> None:
        self.answers = answers  # a text: the worker is lost for this reason; None: no answer
        self.load_s = 60.0
        self.launcher = "local"
        self.asked: list[tuple[str, bool]] = []
        self.told: list[str] = []
        self.model_id = "ab" * 32
        self.workers = {name: handle_of(name, self._sayer(name)) for name in answers}

    def _sayer(self, name: str) -> Callable[[CoordinatorMessage], Awaitable[None]]:
        async def say(message: CoordinatorMessage) -> None:
            assert isinstance(message, ProfileWorker) and message.quant_types == (12, 14)
            self.asked.append((name, bool(message.model_path)))
            answer = self.answers[name] if message.model_path else WorkerProfile(Profile(DeviceProfile(20e9, 300e9)))
            if isinstance(answer, str):
                self.workers[name].lose(answer)
                return
            if answer is None:
                return
            assert isinstance(answer, WorkerProfile | RequestFailed)
            self.workers[name].receive(replace(answer, request_id=message.request_id))

        return say

    def report(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.told.append(event.text)

    def empty(self, folder: Path) -> WorkerProfiles:
        values: dict[str, Any] = {
            "model": "m.gguf",
            "workers": [{"name": name} for name in self.workers],
            "state_dir": folder,
            "launcher": self.launcher,
        }
        values["timeouts"] = {"load": self.load_s}
        file = SimpleNamespace(path=Path("/m.gguf"))
        types = (QuantType.Q4_K, QuantType.Q6_K)
        model: Any = SimpleNamespace(model_id=self.model_id, plain=file, quant_types=types)
        model.widened = model
        config = ClusterConfig.model_validate(values)
        return WorkerProfiles(config, model, folder, self.report)

    async def profiles(self, folder: Path) -> WorkerProfiles:
        profiles = self.empty(folder)
        await profiles.measure(self.workers, self.workers)
        return profiles

    async def measure(self, folder: Path) -> dict[str, Profile]:
        return (await self.profiles(folder)).of(self.workers)


FAILED = RequestFailed(Failure("LlamaclustError", "RuntimeError: out of luck"))
PROFILED = WorkerProfile(Profile(DeviceProfile(10e9, 100e9, (StepTime(1, 1e-4, 1e-11, 1e-3),))))


async def test_a_worker_of_known_hardware_is_not_measured_again_whatever_its_name_and_neighbours(
    tmp_path: Path,
) -> None:
    machines = Machines(a=PROFILED)
    profiles = await machines.profiles(tmp_path)
    asked = [*machines.asked]
    profile = profiles.of(machines.workers)["a"]
    again = Machines(a=PROFILED, x=PROFILED)
    assert profiles.of(again.workers) == {"a": profile, "x": profile}
    await profiles.measure(["x"], again.workers)
    assert not again.asked and len(asked) == 1


async def test_a_worker_that_comes_back_on_other_hardware_is_measured(tmp_path: Path) -> None:
    machines = Machines(a=PROFILED)
    profiles = await machines.profiles(tmp_path)
    moved = Machines(a=WorkerProfile(Profile(DeviceProfile(5e9, 50e9, PROFILED.profile.cpu.concurrent))))
    worker = moved.workers["a"]
    worker.registration = replace(worker.registration, fingerprint="another chip, 4 cores", machine="another")
    assert profiles.of(moved.workers) == {}
    await profiles.measure(["a"], moved.workers)
    assert profiles.of(moved.workers)["a"].cpu.read_bytes_s == 5e9
    assert any(key.startswith("another chip") for key in read_profiles(tmp_path))


async def test_known_hardware_is_estimated_whatever_the_number_of_workers_on_its_machine(tmp_path: Path) -> None:
    """No measurement delays a start without one of the workers."""
    await Machines(a=PROFILED, b=PROFILED).measure(tmp_path)
    left = Machines(a=PROFILED)
    profiles = left.empty(tmp_path)
    assert not profiles.of(left.workers) and profiles.estimate(left.workers)
    await profiles.measure(left.workers, left.workers)
    assert not left.asked and profiles.of(left.workers)["a"].cpu.concurrent == PROFILED.profile.cpu.concurrent
    other = left.workers["a"].registration
    left.workers["a"].registration = replace(other, fingerprint="another chip, 4 cores", machine="another")
    assert not left.empty(tmp_path).estimate(left.workers)


def test_the_most_similar_measurement_has_the_same_hardware_and_model() -> None:
    wanted = measurement_key("a chip, one of a kind", 3, 6, "m")
    others = [measurement_key("a chip", 3, 6, "m"), measurement_key("a chip, one of a kind", 3, 6), "damaged"]
    assert most_similar_key(wanted, others) is None
    near, far = (measurement_key("a chip, one of a kind", sharers, 2 * sharers, "m") for sharers in (2, 5))
    assert most_similar_key(wanted, [*others, far, near]) == near
    assert most_similar_key(wanted, [near, wanted]) == wanted
    other_threads = measurement_key("a chip, one of a kind", 3, 12, "m")
    assert most_similar_key(wanted, [near, other_threads, wanted]) == wanted
    assert most_similar_key(wanted, [near, other_threads]) == other_threads


async def test_figures_of_a_busy_machine_are_not_kept(tmp_path: Path) -> None:
    machines = Machines(a=PROFILED, b=PROFILED)
    machines.workers["a"].stages[1] = (LOAD, Loaded(1, 2, 3, 4))
    registration = machines.workers["b"].registration
    machines.workers["b"].registration = replace(registration, fingerprint="a chip, 2 cores, 1 thread")
    profiles = machines.empty(tmp_path)
    await profiles.measure(["b"], machines.workers)
    assert "b" in profiles.of(machines.workers) and not read_profiles(tmp_path)


async def test_memory_that_measuring_keeps_is_not_planned_with(tmp_path: Path) -> None:
    """Worker a is measured with the other worker and without, and keeps memory both times."""
    kept = replace(PROFILED, kept_bytes=3 << 20)
    machines = Machines(a=kept, b=kept)
    registered = {
        name: replace(worker.registration, free_memory_bytes=1 << 30, machine_free_bytes=1 << 31)
        for name, worker in machines.workers.items()
    }
    for name, worker in machines.workers.items():
        worker.registration = registered[name]
    await machines.measure(tmp_path)
    resources = {name: WorkerResources.of(worker) for name, worker in machines.workers.items()}
    assert [each.free_memory_bytes for each in resources.values()] == [(1 << 30) - (6 << 20), (1 << 30) - (3 << 20)]
    assert sum(machine_shares(resources).values()) == (1 << 31) - (9 << 20)


async def test_memory_that_a_worker_takes_for_its_stages_meanwhile_does_not_count() -> None:
    machines = Machines(a=replace(PROFILED, kept_bytes=3 << 20))
    worker = machines.workers["a"]
    worker.stages[1] = (LOAD, Loaded(1, 2, 3, 4))
    await profile_worker(worker, ProfileWorker("/m.gguf", quant_types=(12, 14)))
    assert WorkerResources.of(worker).free_memory_bytes == REGISTER.free_memory_bytes


@pytest.mark.parametrize(
    ("cpu", "gpu"),
    [
        ({"products": (ProductTime(8, 1, 1e-10),)}, {}),
        ({"products": tuple(ProductTime(12, rows, 1e-10) for rows in range(1, 1000))}, {}),
        ({"isolated_products": (ProductTime(12, 1, 1e-10),)}, {}),
        ({}, {"products": (ProductTime(12, 1, 1e-10),)}),
    ],
    ids=["another type", "too many", "isolated", "of a GPU"],
)
async def test_products_that_were_not_ordered_are_refused(cpu: dict[str, Any], gpu: dict[str, Any]) -> None:
    speed = DeviceProfile(10e9, 100e9)
    machines = Machines(a=WorkerProfile(Profile(replace(speed, **cpu), (replace(speed, **gpu),))))
    worker = machines.workers["a"]
    worker.registration = replace(worker.registration, gpus=(Gpu("cuda:0", "x", 1, 1),))
    with pytest.raises(ProtocolError, match="worker a measured matrix products that were not requested"):
        await profile_worker(worker, ProfileWorker("/m.gguf", quant_types=(12, 14)))


async def test_a_worker_that_joins_again_as_other_hardware_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (profiling, measurements):
        monkeypatch.setattr(module, "MAX_PROFILES", 4)
    machines = Machines(a=PROFILED)
    profiles, worker = machines.empty(tmp_path), machines.workers["a"]
    for number in range(9):
        worker.registration = replace(REGISTER, machine="m", fingerprint=f"cpu {number}")
        await profiles.measure(["a"], machines.workers)
        assert "a" in profiles.of(machines.workers)
    stored = read_profiles(tmp_path)
    assert len(stored) == len(profiles._known) == len(profiles._used) == 4
    assert sum(key.startswith("cpu 8,") for key in stored) == 2


async def test_the_next_heartbeat_tells_what_a_worker_without_layers_may_take() -> None:
    worker = handle_of()
    worker.receive(Heartbeat(0.0, 0, 0, 1, 1 << 30))
    asking = asyncio.create_task(refresh_memory(worker, {}))
    await asyncio.sleep(0)
    assert WorkerResources.of(worker).free_memory_bytes == REGISTER.free_memory_bytes
    worker.receive(Heartbeat(0.0, 0, 0, 1, 1 << 20))
    await asking
    resources = WorkerResources.of(worker)
    assert (resources.free_memory_bytes, resources.is_fresh) == (1 << 20, True)


async def test_without_step_times_plans_use_the_roofline_and_a_notice_says_so(tmp_path: Path) -> None:
    machines = Machines(a=FAILED, b=FAILED)
    measured = await machines.measure(tmp_path)
    alone = DeviceProfile(20e9, 300e9)
    assert list(measured.values()) == 2 * [Profile(alone.beside(alone))]
    isolated = ("a", False)
    assert machines.asked == [("a", True), ("b", True), ("a", False), ("b", False), isolated]
    assert machines.told == [
        f"could not time the model's steps on worker {name}; plans use its matrix product times instead: "
        f"worker {name}: RuntimeError: out of luck"
        for name in "ab"
    ]
    kept = read_profiles(tmp_path)
    assert kept and not [key for key in kept if "model" in key], "the next start measures again"


async def test_products_of_quant_types_are_kept_for_plans_of_other_models(tmp_path: Path) -> None:
    """Times of types that the last model lacks are kept as well."""
    both, one = (ProductTime(12, 1, 2e-11), ProductTime(14, 1, 3e-11)), (ProductTime(12, 1, 4e-11),)
    for model_id, products in (("ab", both), ("cd", one)):
        machines = Machines(a=WorkerProfile(Profile(replace(PROFILED.profile.cpu, products=products))))
        machines.model_id = 32 * model_id
        await machines.measure(tmp_path)
    (hardware,) = (profile for key, profile in read_profiles(tmp_path).items() if "model" not in key)
    assert hardware.cpu.products == (ProductTime(12, 1, 4e-11), ProductTime(14, 1, 3e-11))


async def test_products_of_one_worker_beside_an_idle_one_are_kept_apart(tmp_path: Path) -> None:
    cpu = replace(PROFILED.profile.cpu, products=(ProductTime(12, 1, 2e-11),))
    measured = await Machines(a=WorkerProfile(Profile(cpu)), b=PROFILED).measure(tmp_path)
    assert measured["a"].cpu.isolated_products == cpu.products
    assert measured["a"].cpu.isolated_limits == cpu.limits(concurrent=True)


async def test_step_times_of_one_of_two_equal_workers_serve_both(tmp_path: Path) -> None:
    machines = Machines(a=PROFILED, b=FAILED)
    measured = await machines.measure(tmp_path)
    assert [profile.cpu.concurrent[0].head_s for profile in measured.values()] == [1e-3, 1e-3]
    assert len(machines.told) == 1 and "worker b" in machines.told[0]


async def test_figures_of_gpus_that_a_worker_has_not_are_refused(tmp_path: Path) -> None:
    machines = Machines(a=WorkerProfile(replace(PROFILED.profile, gpus=(DeviceProfile(1e12, 1e14),))), b=PROFILED)
    await machines.measure(tmp_path)
    assert len(machines.told) == 1 and "worker a measured 1 GPUs, but it has 0" in machines.told[0]


async def test_workers_that_call_their_machines_equal_but_have_other_numbers_of_gpus_are_measured(
    tmp_path: Path,
) -> None:
    with_gpu = replace(PROFILED.profile, gpus=(DeviceProfile(1e12, 1e14),))
    machines = Machines(a=PROFILED, b=WorkerProfile(with_gpu))
    registration = machines.workers["b"].registration
    machines.workers["b"].registration = replace(registration, gpus=(Gpu("cuda:0", "a GPU", 1 << 30, 1 << 30),))
    measured = await machines.measure(tmp_path)
    assert [profile.cpu.concurrent for profile in measured.values()] == [PROFILED.profile.cpu.concurrent] * 2
    assert measured["b"].gpus == () and not machines.told


async def test_a_start_goes_on_without_a_worker_that_is_lost_while_it_times_steps(tmp_path: Path) -> None:
    machines = Machines(a=PROFILED, b="its process was killed")
    assert "a" in await machines.measure(tmp_path)
    assert not machines.told
    report_losses(machines.workers.values(), "the start", machines.report)
    assert len(machines.told) == 1
    assert "the start continues without worker b: worker b is lost: its process was killed" in machines.told[0]


class Joined:
    """A registry of workers that have joined a cluster of several models."""

    def __init__(self, machines: Machines) -> None:
        self.joins, self._workers = dict.fromkeys(machines.workers, 1), machines.workers

    @property
    def present(self) -> dict[str, WorkerHandle]:
        return {name: worker for name, worker in self._workers.items() if worker.loss is None}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (PROFILED, ["worker x has been measured"]),
        (None, ["worker x is not measured: worker x: measurement took longer than 1 s (timeouts.load)"]),
        ("its process was killed", []),  # The cluster reports the loss.
    ],
    ids=["measured", "silent", "lost"],
)
async def test_a_newcomer_is_called_measured_only_if_it_is(
    answer: WorkerMessage | str | None, told: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machines, seen = Machines(x=answer), list[object]()
    machines.load_s = 1.0 if answer is None else 60.0
    registry: Any = Joined(machines)
    planners = [SimpleNamespace(profiles=machines.empty(tmp_path)) for _ in range(2)]
    runners: Any = [SimpleNamespace(planner=each, store=SimpleNamespace(post=seen.append)) for each in planners]
    newcomers = Newcomers(registry, runners, ANYTHING, machines.report)
    newcomers.take(machines.workers["x"])
    async with asyncio.timeout(60):
        await newcomers._tasks.join()
    assert [text.partition(";")[0] for text in machines.told] == told and not caplog.records
    assert len(seen) == (0 if "x" not in registry.present else 2)


@pytest.mark.parametrize("silent", [("a",), ("c",), ("a", "b")], ids=str)
async def test_a_worker_that_is_never_measured_does_not_hold_up_the_start(
    tmp_path: Path, silent: tuple[str, ...]
) -> None:
    answers: dict[str, WorkerMessage | str | None] = {name: None if name in silent else PROFILED for name in "abc"}
    machines = Machines(**answers)
    machines.load_s = 1.0
    found = await machines.measure(tmp_path)
    assert found, "equal workers stand for it"
    told = [
        text for text in machines.told if "is not measured" in text and "took longer than 1 s (timeouts.load)" in text
    ]
    assert [text.split()[1] for text in told] == [*silent]
    assert [name for name, _ in machines.asked if name in silent] == [*silent], "each once"


async def test_a_worker_whose_measurement_fails_does_not_end_the_start(tmp_path: Path) -> None:
    machines = Machines(a=PROFILED, b=FAILED)

    async def say(message: CoordinatorMessage) -> None:
        assert isinstance(message, ProfileWorker)
        machines.workers["b"].receive(replace(FAILED, request_id=message.request_id))

    machines.workers["b"].channel.send = say
    await machines.measure(tmp_path)
    assert any("worker b is not measured" in text and "out of luck" in text for text in machines.told)


@pytest.mark.parametrize("launcher", ["local", "static"])
@pytest.mark.parametrize("others", [0.0, 0.5, 1.4])
async def test_a_start_tells_that_other_programs_disturbed_its_measurements(
    tmp_path: Path, others: float, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load by workers of other launchers is unknown, because their processes are not below this one."""
    load = OtherLoad(2, others, 0.0)
    monkeypatch.setattr(LoadMeter, "measure", lambda self: load)
    is_told = others > 0.2 and launcher == "local"
    for start in range(2):  # the second start measures nothing
        machines = Machines(a=PROFILED, b=PROFILED)
        machines.launcher = launcher
        await machines.measure(tmp_path)
        assert [f"used {others} of 2 cores" in text for text in machines.told] == [True] * is_told
        assert bool(machines.asked) == (start == 0)
