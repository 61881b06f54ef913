from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Plan
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention, Program, SequenceState, StatePart

_KV_TYPES = tuple(KvType)
"""The KV types, in the order of their numbers in the native enum."""


@dataclass(frozen=True, slots=True)
class PlanKv:
    plan: Plan
    limits: StageLimits
    # Numbers of KV memory and states, by (layer, state part). The part is None for attention.
    _numbers: dict[tuple[int, StatePart | None], int] = field(default_factory=dict)

    def attention(self, step: Attention) -> int:
        """Returns the plan's number for the step's KV memory. Raises ValueError if that memory is on another worker."""
        name = step.layer, None
        if not step.shares_kv and name not in self._numbers:
            windowed, kv_type = self.limits.gives_up(step.window), _KV_TYPES.index(step.kv_type)
            self._numbers[name] = self.plan.add_kv_layer(
                step.kv_heads, step.head_dim, kv_type, windowed, step.v is None
            )
        if name not in self._numbers:
            raise ValueError(f"keys and values of layer {step.layer} are on another worker")
        return self._numbers[name]

    def state(self, state: SequenceState) -> int:
        name = state.layer, state.part
        assert name not in self._numbers, "two states of one name"
        self._numbers[name] = self.plan.add_state(state.floats)
        return self._numbers[name]

    def by_layer(self, program: Program) -> tuple[tuple[int, ...], ...]:
        layers: dict[int, list[int]] = {}
        for kept in program.kv_memory:
            part = kept.part if isinstance(kept, SequenceState) else None
            layers.setdefault(kept.layer, []).append(self._numbers[kept.layer, part])
        return tuple(tuple(layers.get(layer, ())) for layer in program.layer_range)
