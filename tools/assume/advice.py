"""What would make a model fit described machines, or run faster on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from llamaclust.cluster.planner.plan import Prediction
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import gigabytes
from llamaclust.tools.assume import rates
from llamaclust.tools.assume.assumed_model import AssumedModel
from llamaclust.tools.assume.machines import MAX_MACHINES, AssumedMachines, Device, Machine
from llamaclust.tools.assume.planning import AssumedCluster, prediction_of

_GIB = 1 << 30
_SMALLER_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
_FURTHER = 3
"""So many machines more than memory alone asks for are tried."""
_WORTH_DECODE, _WORTH_PROMPT = 0.95, 0.9
"""What makes a token or a prompt take less than this share of its time would help."""


def what_fits(cluster: AssumedCluster, model: AssumedModel, error: InsufficientMemoryError) -> Iterator[str]:
    """The largest quantization that fits, and the fewest further machines like the last one."""
    machines = cluster.assumed.machines
    most_bytes = sum(device.memory_bytes for machine in machines for device in (machine.cpu, *machine.gpus))
    for smaller in _smaller(model):
        if smaller.file.size_bytes < most_bytes and cluster.fitting_plan(smaller) is not None:
            yield f"{smaller.mix}, {gigabytes(smaller.file.size_bytes)}"
            break
    last = machines[-1]
    room_bytes = last.cpu.memory_bytes - rates.SYSTEM_BYTES
    if error.missing_bytes is None or room_bytes <= 0:
        return
    least = max(1, ceil(error.missing_bytes / room_bytes))
    for count in range(least, min(least + _FURTHER, MAX_MACHINES - len(machines)) + 1):
        if cluster.with_machines(count).fitting_plan(model) is not None:
            yield f"{count} more of {_memory(last.cpu)}"
            return


def what_helps(cluster: AssumedCluster, model: AssumedModel, now: Prediction) -> Iterator[str]:
    """Changes that would make one request clearly faster."""
    for what, changed, instead in _changes(cluster, model):
        plan = changed.fitting_plan(instead)
        if plan is None:
            continue
        then, gains = prediction_of(plan), []
        if then.token_s < _WORTH_DECODE * now.token_s:
            gains.append(f"{shown_speed(1 / then.token_s)} tok/s")
        if then.ttft_s < _WORTH_PROMPT * now.ttft_s:
            gains.append(f"first token after {1e3 * then.ttft_s:.0f} ms")
        if gains:
            yield f"{what}: {', '.join(gains)}"


def _changes(cluster: AssumedCluster, model: AssumedModel) -> Iterator[tuple[str, AssumedCluster, AssumedModel]]:
    assumed = cluster.assumed
    if len(assumed.machines) < MAX_MACHINES:
        yield "one more such machine", cluster.with_machines(1), model
    yield "twice the memory bandwidth", cluster.changed(_faster_memory(assumed)), model
    if len(assumed.machines) > 1:
        faster = 10 * (assumed.network.bits_s or rates.NETWORK_BITS_S)
        network = replace(assumed.network, bits_s=faster)
        yield f"a network of {faster / 1e9:g} Gbit/s", cluster.changed(replace(assumed, network=network)), model
    if (smaller := next(_smaller(model), None)) is not None:
        yield f"{smaller.mix} in place of {model.mix or 'the file'}", cluster, smaller


def _smaller(model: AssumedModel) -> Iterator[AssumedModel]:
    """In smaller mixes, the largest first."""
    mixes = (model.quantized(mix) for mix in _SMALLER_MIXES)
    smaller = [one for one in mixes if one.file.size_bytes < 0.95 * model.file.size_bytes]
    yield from sorted(smaller, key=lambda one: -one.file.size_bytes)


def _faster_memory(assumed: AssumedMachines) -> AssumedMachines:
    def faster(machine: Machine) -> Machine:
        return replace(machine, cpu=replace(machine.cpu, bandwidth=2 * rates.read_bytes_s(machine.cpu)))

    return replace(assumed, machines=tuple(map(faster, assumed.machines)))


def _memory(device: Device) -> str:
    return f"{device.memory_bytes / _GIB:g} GB"


def shown_speed(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
