"""Checks that the weights of layer costs by quant type are all weights that rows are multiplied with."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.model.costs import TypedWeights
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import build_tiny_model


def test_weights_of_a_layer_by_type(tmp_path: Path) -> None:
    path = build_tiny_model(
        tmp_path / "m.gguf", quant_type=QuantType.Q8_0, other_types={"ffn_down": QuantType.F16, "output": QuantType.F16}
    )
    with Model.open(path) as model:
        costs = model.costs(KvType.F16)
        layer = costs.layers[0]
        down = 512 * 256
        others = 2 * 256 * 256 + 2 * 64 * 256 + 2 * 512 * 256
        assert layer.weights[0] == TypedWeights(QuantType.F16, 2 * down + 2 * 256 * 256, down + 256 * 256)
        assert layer.weights[1] == TypedWeights(QuantType.Q8_0, (others - 256 * 256) // 32 * 34, others - 256 * 256)
        assert layer.expert_weights == ()
        assert sum(each.macs for each in layer.weights) == layer.macs_per_token
        assert layer.weight_bytes - sum(each.n_bytes for each in layer.weights) == 2 * 4 * 256, "norms"
        assert costs.head_weights == (TypedWeights(QuantType.F16, 2 * 320 * 256, 320 * 256),)
        assert model.quant_types == (QuantType.F16, QuantType.Q8_0)


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_of_experts_are_apart_and_routers_are_neither(tmp_path: Path, shards: int) -> None:
    with Model.open(build_tiny_model(tmp_path / "m.gguf", quant_type=QuantType.Q8_0, layers=2, experts=4)) as model:
        parts = model.costs(KvType.F16, shards).layers[:shards]
        experts = [weights for part in parts for weights in part.expert_weights]
        assert {weights.quant_type for weights in experts} == {QuantType.Q8_0}
        assert sum(weights.n_bytes for weights in experts) == 4 * 3 * 512 * 256 // 32 * 34
        assert sum(weights.macs for weights in experts) == 2 * 3 * 512 * 256
        router_bytes = sum(part.expert_bytes for part in parts) - sum(weights.n_bytes for weights in experts)
        assert router_bytes >= 4 * 4 * 256
        for part in parts:
            held = sum(weights.n_bytes for weights in part.expert_weights)
            assert part.idle_bytes == pytest.approx(held * part.idle_share)
            assert part.touched_share(1) == pytest.approx(1 - part.idle_share)
        assert model.quant_types == (QuantType.Q8_0,), "norms and routers are float32"
