"""What the planner predicts of the ways in which a model is served, by products and steps measured on one core."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from ways import Way

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.planner.links import USUAL, Link, Links
from llamaclust.cluster.planner.plan import Plan, usual_prompt_tokens
from llamaclust.core.profile import DeviceProfile, Profile, StepTime
from llamaclust.model.loader import Model
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.settings import WorkerSettings

_MEMORY_BYTES = 1 << 40
_LOOPBACK_BYTE_S = 0.4e-9


@dataclass(slots=True)
class Predictions:
    """Of one model, with keys of a cluster file."""

    model: Model
    cpu: DeviceProfile
    keys: Mapping[str, Any]
    gbit_s: float = 0.0  # 0: as loopback has it
    _plans: dict[tuple[str, float], Plan] = field(default_factory=dict)

    @classmethod
    def measured(cls, path: Path, keys: Mapping[str, Any], gbit_s: float) -> Self:
        """By one thread of this process, which is to have a core of its own."""
        model = Model.open(path)
        device = Device.open(WorkerSettings(name="measured", threads=1))
        return cls(model, device.measure(model, sorted(map(int, model.quant_types))).cpu, keys, gbit_s)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt whose first token is predicted."""
        return usual_prompt_tokens(int(self.keys["context_length"]))

    def ms(self, part: str, way: Way, exchange_us: float) -> float:
        """The predicted time of a part of the benchmark. `exchange_us`: of a gather of few bytes, one way."""
        key = way.name, exchange_us
        if key not in self._plans:
            self._plans[key] = self._plan(way, exchange_us)
        prediction = self._plans[key].prediction
        assert prediction is not None
        times = {"decode": prediction.token_s, "prefill": prediction.ttft_s, "together": 1 / prediction.tokens_per_s}
        return 1e3 * times[part]

    def _plan(self, way: Way, exchange_us: float) -> Plan:
        layers, names = self.model.layer_count, "abcdefgh"[: len(way.cores)]
        speeds = dict(zip(names, [*way.speeds, *[1.0] * len(names)], strict=False))
        byte_s = 8e-9 / self.gbit_s if self.gbit_s else _LOOPBACK_BYTE_S
        link = Link(USUAL.one_way_s, byte_s, 1e-6 * exchange_us)
        keys = {"workers": [{"name": name} for name in names], "plan": way.plan(layers), **self.keys}
        resources = ClusterResources(
            {name: WorkerResources(name, _MEMORY_BYTES, threads=1, accepts_links=True) for name in names},
            {name: Profile(_slowed(self.cpu, speed)) for name, speed in speeds.items()},
            Links({frozenset(pair): link for pair in combinations(names, 2)}),
        )
        overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        return plan_cluster(load_config(None, overrides), self.model, resources)


def _slowed(cpu: DeviceProfile, speed: float) -> DeviceProfile:
    """The profile of a core of that speed."""
    return replace(
        cpu,
        read_bytes_s=speed * cpu.read_bytes_s,
        int8_macs_s=speed * cpu.int8_macs_s,
        concurrent=tuple(_slowed_step(step, speed) for step in cpu.concurrent),
        isolated=tuple(_slowed_step(step, speed) for step in cpu.isolated),
        products=tuple(replace(each, byte_s=each.byte_s / speed) for each in cpu.products),
        isolated_products=tuple(replace(each, byte_s=each.byte_s / speed) for each in cpu.isolated_products),
        isolated_limits=None,
    )


def _slowed_step(step: StepTime, speed: float) -> StepTime:
    return StepTime(step.rows, step.stage_s / speed, step.layers_byte_s / speed, step.head_s / speed)
