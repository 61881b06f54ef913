"""Estimates the time of layers that were not measured, from product times, bandwidth and the 8-bit peak rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from llamaclust.cluster.planner.product_times import ProductTimes
from llamaclust.core.profile import DeviceProfile, StepTime
from llamaclust.model.costs import LayerCost, ModelCosts, TypedWeights

LAUNCHES_S: Final = 30e-6
"""Seconds to launch the kernels of a layer on a GPU. The value is assumed, not measured."""
LAYER_S: Final = 60e-6
"""Seconds of a layer on a CPU in addition to its matrix products."""
ROW_MACS: Final = 3000
"""Work other than matrix products, in 8-bit multiply-accumulates per channel of a row."""
_STATE_MACS: Final = 4
"""Number of 8-bit multiply-accumulates that take as long as one float multiply-accumulate on a state."""


@dataclass(frozen=True, slots=True)
class Roofline:
    _read_bytes_s: float
    _int8_macs_s: float
    _products: ProductTimes | None  # None for a GPU, whose limits do not depend on the quant type.
    _row_s: float  # Seconds of one row in a layer, without matrix products.

    @classmethod
    def of(cls, profile: DeviceProfile, device: str, hidden_bytes: int, *, concurrent: bool) -> Self:
        """Makes a device's roofline model from its profile. `hidden_bytes` is the size of a float32 hidden state."""
        products = ProductTimes.of(profile, concurrent=concurrent) if device == "cpu" else None
        limits = profile.limits(concurrent=concurrent)
        row_s = ROW_MACS * hidden_bytes / 4 / limits.int8_macs_s
        return cls(limits.read_bytes_s, limits.int8_macs_s, products, row_s)

    def layer_s(self, layer: LayerCost, rows: int, sequences: int) -> float:
        return self._rest_s(layer, rows, sequences) + self.experts_s(layer, rows)

    def experts_s(self, layer: LayerCost, rows: int) -> float:
        """Returns the seconds of a layer's router and experts. Each row uses only its chosen experts."""
        weights, share = self._typed(layer.expert_weights), layer.touched_share(rows)
        n_bytes = layer.touched_expert_bytes(rows) - share * _bytes_of(weights)
        macs = rows * (layer.expert_macs_per_token - _macs_of(weights))
        rows_of_each = rows * layer.touched_share(1) / share
        return self._products_s(weights, rows_of_each, share) + self._other_s(n_bytes, macs)

    def head_s(self, model: ModelCosts, rows: int) -> float:
        weights = self._typed(model.head_weights)
        n_bytes, macs = model.head_bytes - _bytes_of(weights), rows * (model.head_macs - _macs_of(weights))
        return self._products_s(weights, rows) + self._other_s(n_bytes, macs)

    def _rest_s(self, layer: LayerCost, rows: int, sequences: int) -> float:
        weights = self._typed(layer.weights)
        n_bytes = layer.moved_bytes(rows, sequences) - layer.touched_expert_bytes(rows) - _bytes_of(weights)
        macs = layer.macs_per_token - layer.expert_macs_per_token + (_STATE_MACS - 1) * layer.state_macs_per_token
        other_s = self._other_s(n_bytes, rows * (macs - _macs_of(weights)))
        steps_s = LAUNCHES_S if self._products is None else LAYER_S + rows * self._row_s if weights else 0.0
        return steps_s + self._products_s(weights, rows) + other_s

    def _typed(self, weights: Sequence[TypedWeights]) -> Sequence[TypedWeights]:
        return () if self._products is None else weights

    def _products_s(self, weights: Sequence[TypedWeights], rows: float, share: float = 1.0) -> float:
        return share * self._products.seconds(weights, rows) if self._products else 0.0

    def _other_s(self, n_bytes: float, macs: float) -> float:
        return max(n_bytes / self._read_bytes_s, macs / self._int8_macs_s, 0.0)


def retimed(profile: DeviceProfile, measured: ModelCosts, other: ModelCosts) -> DeviceProfile:
    return replace(
        profile,
        concurrent=tuple(_retimed(time, profile, measured, other, concurrent=True) for time in profile.concurrent),
        isolated=tuple(_retimed(time, profile, measured, other, concurrent=False) for time in profile.isolated),
    )


def _retimed(
    time: StepTime, profile: DeviceProfile, measured: ModelCosts, other: ModelCosts, *, concurrent: bool
) -> StepTime:
    rows, roofline = time.rows, Roofline.of(profile, "cpu", measured.hidden_bytes, concurrent=concurrent)

    def byte_s(costs: ModelCosts) -> float:
        seconds = sum(roofline.layer_s(layer, rows, rows) for layer in costs.layers)
        return seconds / sum(layer.moved_bytes(rows, rows) for layer in costs.layers)

    return replace(
        time,
        layers_byte_s=time.layers_byte_s * byte_s(other) / byte_s(measured),
        head_s=time.head_s * roofline.head_s(other, rows) / roofline.head_s(measured, rows),
    )


def _bytes_of(weights: Sequence[TypedWeights]) -> int:
    return sum(each.n_bytes for each in weights)


def _macs_of(weights: Sequence[TypedWeights]) -> int:
    return sum(each.macs for each in weights)
