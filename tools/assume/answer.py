"""The plan of a set of machines that are described, not there: what it would bring, what would help, what lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.core.profile import Profile
from llamaclust.model.loader import Model
from llamaclust.tools.assume import rates
from llamaclust.tools.assume.machines import MAX_MACHINES, Assumed, Device, Machine, parse_machines
from llamaclust.tools.assume.paper_model import PaperModel, paper_model

KEYS = ("context_length", "kv_memory", "kv_type", "max_sequences", "objective", "plan", "prefill_chunk")
"""Of a cluster file, those that a plan on paper obeys."""

_GIB = 1 << 30
_SMALLER_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
_FURTHER = 3
"""So many machines more than memory alone asks for are tried."""
_WORTH_DECODE, _WORTH_PROMPT = 0.95, 0.9
"""What makes a token or a prompt take less than this share of its time would help."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan that fits."""

    model: PaperModel
    assumed: Assumed
    plan: Plan
    helps: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """The plan's values, beside what it was made from."""
        return plan_json(self.plan) | {
            "model": self.model.title,
            "quantization": self.model.mix,
            "file_bytes": self.model.file.size_bytes,
            "machines": len(self.assumed.machines),
            "helps": list(self.helps),
            "assumptions": list(rates.assumptions(self.assumed)),
        }

    def lines(self) -> Iterator[str]:
        """The text of `plan`, between a summary and what was assumed."""
        prediction = _prediction(self.plan)
        used = len(self.plan.stages)
        yield (
            f"{_named(self.model)} on {used} of {_machines(len(self.assumed.machines))}: it fits, "
            f"{_speed(1 / prediction.token_s)} tok/s for one request"
        )
        yield from plan_lines(self.plan)
        yield from (f"  what would help: {text}" for text in self.helps)
        yield from (f"  assumed: {text}" for text in rates.assumptions(self.assumed))


def answer(machines: str, spec: str, overrides: Sequence[str]) -> Answer:
    """UsageError for a wrong description, model or override; InsufficientMemoryError with the MiB that are missing, and
    what would fit."""
    assumed, model = parse_machines(machines), paper_model(spec)
    _check_keys(overrides)
    try:
        plan = _plan(assumed, model, overrides)
    except InsufficientMemoryError as error:
        fitting = "; or take ".join(_fitting(assumed, model, overrides, error))
        advice = f"; what would fit: {fitting}" if fitting else ""
        explained = InsufficientMemoryError(f"{_named(model)}: {error}{advice}")
        explained.missing_bytes = error.missing_bytes
        raise explained from error
    return Answer(model, assumed, plan, tuple(_helps(assumed, model, overrides, _prediction(plan))))


def _check_keys(overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key.split(".")[0] not in KEYS:
            raise UsageError(f"--set {key[:100]}: a plan on paper has no such key; it has {', '.join(KEYS)}")


def _plan(assumed: Assumed, model: PaperModel, overrides: Sequence[str]) -> Plan:
    workers = {f"m{number}": machine for number, machine in enumerate(assumed.machines, 1)}
    resources = ClusterResources(
        workers={name: _resources(name, machine) for name, machine in workers.items()},
        profiles={name: _profile(machine) for name, machine in workers.items()},
        links=rates.links_of(assumed.network, list(workers)),
    )
    config = _config(list(workers), overrides)
    with closing(Model(model.file)) as opened:
        try:
            return plan_cluster(config, opened, resources)
        except ModelFileError as error:
            if not any(machine.gpus for machine in assumed.machines):
                raise
            raise UsageError(f"--assume: {model.title}: {error}; leave the GPUs out") from error


def _config(names: Sequence[str], overrides: Sequence[str]) -> ClusterConfig:
    workers = json.dumps([{"name": name} for name in names])
    return load_config(None, ["name=paper", "objective=latency", f"workers={workers}", *overrides])


def _resources(name: str, machine: Machine) -> WorkerResources:
    gpus = (
        Gpu(f"cuda:{number}", "assumed", gpu.memory_bytes, max(0, gpu.memory_bytes - rates.GPU_RESERVED_BYTES))
        for number, gpu in enumerate(machine.gpus)
    )
    free_bytes = max(0, machine.cpu.memory_bytes - rates.SYSTEM_BYTES)
    return WorkerResources(name, free_bytes, gpus=tuple(gpus), threads=rates.threads_of(machine.cpu))


def _profile(machine: Machine) -> Profile:
    return Profile(rates.cpu_profile(machine.cpu), tuple(map(rates.gpu_profile, machine.gpus)))


def _fitting(
    assumed: Assumed, model: PaperModel, overrides: Sequence[str], error: InsufficientMemoryError
) -> Iterator[str]:
    """The largest quantization that fits, and the fewest further machines like the last one."""
    devices = [device for machine in assumed.machines for device in (machine.cpu, *machine.gpus)]
    most_bytes = sum(device.memory_bytes for device in devices)
    for smaller in _smaller(model):
        if smaller.file.size_bytes < most_bytes and _try(assumed, smaller, overrides) is not None:
            yield f"{smaller.mix}, {smaller.file.size_bytes / 1e9:.1f} GB"
            break
    last = assumed.machines[-1]
    room_bytes = last.cpu.memory_bytes - rates.SYSTEM_BYTES
    if error.missing_bytes is None or room_bytes <= 0:
        return
    least = max(1, ceil(error.missing_bytes / room_bytes))
    for count in range(least, min(least + _FURTHER, MAX_MACHINES - len(assumed.machines)) + 1):
        if _try(_with(assumed, count), model, overrides) is not None:
            yield f"{count} more of {_memory(last.cpu)}"
            return


def _helps(assumed: Assumed, model: PaperModel, overrides: Sequence[str], now: Prediction) -> Iterator[str]:
    """Changes that would make one request clearly faster."""
    changed = [
        ("one more such machine", _with(assumed, 1), model),
        ("twice the memory bandwidth", _faster_memory(assumed), model),
    ]
    if len(assumed.machines) > 1:
        faster = 10 * (assumed.network.bits_s or rates.NETWORK_BITS_S)
        network = replace(assumed.network, bits_s=faster)
        changed.append((f"a network of {faster / 1e9:g} Gbit/s", replace(assumed, network=network), model))
    if (smaller := next(_smaller(model), None)) is not None:
        changed.append((f"{smaller.mix} in place of {model.mix or 'the file'}", assumed, smaller))
    for what, machines, instead in changed:
        plan = _try(machines, instead, overrides)
        if plan is None:
            continue
        then, gains = _prediction(plan), []
        if then.token_s < _WORTH_DECODE * now.token_s:
            gains.append(f"{_speed(1 / then.token_s)} tok/s")
        if then.ttft_s < _WORTH_PROMPT * now.ttft_s:
            gains.append(f"first token after {1e3 * then.ttft_s:.0f} ms")
        if gains:
            yield f"{what}: {', '.join(gains)}"


def _smaller(model: PaperModel) -> Iterator[PaperModel]:
    """In smaller mixes, the largest first."""
    mixes = (model.quantized(mix) for mix in _SMALLER_MIXES)
    smaller = [one for one in mixes if one.file.size_bytes < 0.95 * model.file.size_bytes]
    yield from sorted(smaller, key=lambda one: -one.file.size_bytes)


def _try(assumed: Assumed, model: PaperModel, overrides: Sequence[str]) -> Plan | None:
    try:
        return _plan(assumed, model, overrides)
    except InsufficientMemoryError:
        return None


def _with(assumed: Assumed, count: int) -> Assumed:
    return replace(assumed, machines=(*assumed.machines, *((assumed.machines[-1],) * count)))


def _faster_memory(assumed: Assumed) -> Assumed:
    def faster(machine: Machine) -> Machine:
        return replace(machine, cpu=replace(machine.cpu, read_bytes_s=2 * machine.cpu.read_bytes_s))

    return replace(assumed, machines=tuple(map(faster, assumed.machines)))


def _prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None  # all devices have profiles
    return plan.prediction


def _named(model: PaperModel) -> str:
    kind = "" if model.mix is None else f" {model.mix}"
    return f"{model.title}{kind} ({model.file.size_bytes / 1e9:.1f} GB)"


def _memory(device: Device) -> str:
    return f"{device.memory_bytes / _GIB:g} GB"


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _speed(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
