"""The layout of experts in a cache's memory. Experts of equal layout share a pool of slots for one expert each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import Moe

_FLOAT = 4


@dataclass(frozen=True, slots=True)
class SlotLayout:
    matrix_bytes: tuple[int, ...]
    bias_bytes: tuple[int, ...]

    @classmethod
    def of(cls, step: Moe, weights: Mapping[str, Weights]) -> SlotLayout:
        matrices = tuple(weights[name].matrix_bytes for name in (*step.inner, step.down))
        return cls(matrices, tuple(_FLOAT * weights[name].cols for name in step.biases))

    @property
    def stride_bytes(self) -> int:
        return sum(self.matrix_bytes)

    @property
    def expert_bytes(self) -> int:
        return self.stride_bytes + sum(self.bias_bytes)

    @property
    def matrix_offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(self.matrix_bytes[:-1], initial=0))

    def pool_bytes(self, slots: int) -> int:
        return self._offsets(slots)[-1]

    def bias_offsets(self, slots: int) -> Sequence[int]:
        return self._offsets(slots)[:-1]

    def _offsets(self, slots: int) -> Sequence[int]:
        sizes = (self.stride_bytes, *self.bias_bytes)
        return tuple(accumulate(aligned(slots * size) for size in sizes))

    def places(self, slots: int, slot: int) -> tuple[int, ...]:
        """Returns the offsets of a slot's parts in its pool, in the order of `ExpertsStage.expert_weights`."""
        matrices = (slot * self.stride_bytes + offset for offset in self.matrix_offsets)
        biases = zip(self.bias_offsets(slots), self.bias_bytes, strict=True)
        return (*matrices, *(offset + slot * size for offset, size in biases))


def slot_counts(experts: Mapping[SlotLayout, int], n_bytes: int) -> dict[SlotLayout, int]:
    """Divides `n_bytes` among the pools in proportion to their experts' sizes. Returns each pool's number of slots."""
    total = sum(layout.expert_bytes * count for layout, count in experts.items())
    share = min(1.0, n_bytes / total)
    counts = {
        layout: min(count, int(share * layout.expert_bytes * count / layout.pool_bytes(1)))
        for layout, count in experts.items()
    }
    while grown := _grown(counts, experts, n_bytes):
        counts = grown
    return counts


def pools_bytes(counts: Mapping[SlotLayout, int]) -> int:
    return sum(layout.pool_bytes(slots) for layout, slots in counts.items())


def _grown(
    counts: Mapping[SlotLayout, int], experts: Mapping[SlotLayout, int], n_bytes: int
) -> dict[SlotLayout, int] | None:
    for layout in sorted(counts, key=lambda layout: counts[layout] / experts[layout]):
        more = {**counts, layout: counts[layout] + 1}
        if more[layout] <= experts[layout] and pools_bytes(more) <= n_bytes:
            return more
    return None
