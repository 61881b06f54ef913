"""Finds changes that make a model fit or run faster: more machines, a better network, or a smaller quantization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import gigabytes
from llamaclust.tools.assume import rates
from llamaclust.tools.assume.assumed_model import AssumedModel
from llamaclust.tools.assume.machines import MAX_MACHINES, AssumedMachines, Machine, Network
from llamaclust.tools.assume.planning import AssumedCluster, prediction_of, room_bytes

_GIB = 1 << 30
_SMALLER_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_M", "IQ2_XXS")
_FEW_BITS = 3.0
"""Answers become clearly worse below this number of bits per weight."""
_FURTHER = 3
"""Maximum number of machines to try beyond the minimum that covers the missing memory."""
_NETWORKS = ((1.0, 1.0), (1.0, 0.3), (1.0, 0.1), (2.5, 0.1), (10.0, 0.1), (10.0, 0.05), (25.0, 0.03))
"""Networks to try for groups of machines, slowest first. Each network is (Gbit/s, round trip in ms)."""
_WORTH_DECODE, _WORTH_PROMPT = 0.95, 0.9
"""A change is advised if it lowers the time per token, or the time to first token, to less than this share."""


@dataclass(frozen=True, slots=True)
class Alone:
    machine: str
    prediction: Prediction

    def is_better(self, together: Prediction) -> bool:
        """Returns True if this machine's time per token is less than 1.05 times that of all machines together."""
        return self.prediction.token_s < 1.05 * together.token_s


def fastest_alone(cluster: AssumedCluster, model: AssumedModel) -> Alone | None:
    found = list[Alone]()
    for machine in dict.fromkeys(cluster.assumed.machines):
        plan = cluster.with_one(machine).fitting_plan(model)
        if plan is not None:
            found.append(Alone(f"m{cluster.assumed.machines.index(machine) + 1}", prediction_of(plan)))
    return min(found, key=lambda alone: alone.prediction.token_s, default=None)


def what_fits(cluster: AssumedCluster, model: AssumedModel, error: InsufficientMemoryError) -> Iterator[str]:
    """Yields advice for a model that does not fit in memory: the largest quantization that fits, and the number of
    machines to add."""
    for smaller in _smaller(model):
        if cluster.fitting_plan(smaller) is not None:
            yield f"{smaller.mix}, {gigabytes(smaller.file.size_bytes)}{_remark(smaller)}"
            break
    machines = cluster.assumed.machines
    last = machines[-1]
    if error.missing_bytes is None or not room_bytes(last):
        return
    least = max(1, ceil(error.missing_bytes / room_bytes(last)))
    for count in range(least, min(least + _FURTHER, MAX_MACHINES - len(machines)) + 1):
        if cluster.with_machines(count).fitting_plan(model) is not None:
            yield f"{count} more of {_memory(last)}"
            return


def what_helps(cluster: AssumedCluster, model: AssumedModel, plan: Plan) -> Iterator[str]:
    now, expert_shards = prediction_of(plan), plan.expert_shards
    for what, changed, instead in _changes(cluster, model):
        other = changed.fitting_plan(instead, max_expert_shards=expert_shards)
        if other is None:
            continue
        then, gains = prediction_of(other), []
        if then.token_s < _WORTH_DECODE * now.token_s:
            gains.append(f"{shown_speed(1 / then.token_s)} tok/s")
        if then.ttft_s < _WORTH_PROMPT * now.ttft_s:
            gains.append(f"first token after {1e3 * then.ttft_s:.0f} ms")
        if gains:
            yield f"{what}: {', '.join(gains)}"
    yield from _what_groups_need(cluster, model, plan)


def _what_groups_need(cluster: AssumedCluster, model: AssumedModel, plan: Plan) -> Iterator[str]:
    """Yields the minimum network speed for tensor-parallel groups to beat `plan`, or nothing if `plan` has groups."""
    assumed, now = cluster.assumed, prediction_of(plan)
    is_grouped = any(stage.shares for stage in plan.stages)
    if len(assumed.machines) < 2 or is_grouped or any(text.startswith("groups=") for text in cluster.overrides):
        return
    for network in _better_networks(assumed.network):
        other = cluster.changed(replace(assumed, network=network)).fitting_plan(model)
        if other is None or not any(stage.shares for stage in other.stages):
            continue
        then = prediction_of(other)
        if then.token_s < _WORTH_DECODE * now.token_s:
            shown = (
                f"{(network.bits_s or 0) / 1e9:g} Gbit/s and a round trip of {1e3 * (network.round_trip_s or 0):g} ms"
            )
            yield f"groups of machines, with {shown} or better: {shown_speed(1 / then.token_s)} tok/s"
            return


def _better_networks(now: Network) -> Iterator[Network]:
    bits_s, round_trip_s = rates.bits_s(now), rates.round_trip_s(now)
    for gbit_s, most_ms in _NETWORKS:
        better = Network(max(bits_s, 1e9 * gbit_s), min(round_trip_s, 1e-3 * most_ms))
        if (better.bits_s, better.round_trip_s) != (bits_s, round_trip_s):
            yield better


def _changes(cluster: AssumedCluster, model: AssumedModel) -> Iterator[tuple[str, AssumedCluster, AssumedModel]]:
    assumed = cluster.assumed
    if len(assumed.machines) < MAX_MACHINES:
        yield _one_more(assumed), cluster.with_machines(1), model
    if len(assumed.machines) > 1:
        faster = 10 * rates.bits_s(assumed.network)
        network = replace(assumed.network, bits_s=faster)
        yield f"a network of {faster / 1e9:g} Gbit/s", cluster.changed(replace(assumed, network=network)), model
    smaller = next((one for one in _smaller(model) if one.bits_per_weight >= _FEW_BITS), None)
    if smaller is not None:
        yield f"{smaller.mix}{_remark(smaller)} in place of {model.shown_mix or 'the file'}", cluster, smaller


def _smaller(model: AssumedModel) -> Iterator[AssumedModel]:
    if model.has_mxfp4:
        return
    mixes = (model.quantized(mix) for mix in _SMALLER_MIXES)
    smaller = [one for one in mixes if one.file.size_bytes < 0.95 * model.file.size_bytes]
    yield from sorted(smaller, key=lambda one: (not one.is_in_catalog, -one.file.size_bytes))


def _remark(model: AssumedModel) -> str:
    made = "" if model.is_in_catalog else "by `llamaclust model quantize`"
    bits = model.bits_per_weight
    quality = "" if bits >= _FEW_BITS else f"{bits:.1f} bits a weight: clearly worse answers"
    remarks = "; ".join(filter(None, (made, quality)))
    return f" ({remarks})" if remarks else ""


def _one_more(assumed: AssumedMachines) -> str:
    *others, last = assumed.machines
    is_like_all = all(machine == last for machine in others)
    return "one more such machine" if is_like_all else f"one more like m{len(others) + 1} ({_memory(last)})"


def _memory(machine: Machine) -> str:
    cpu, *gpus = (f"{device.memory_bytes / _GIB:g} GB" for device in (machine.cpu, *machine.gpus))
    return cpu if not gpus else f"{cpu} with {' and '.join(f'a GPU of {gpu}' for gpu in gpus)}"


def shown_speed(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
