"""What the member of a group has of a model: a portion of every product's output rows, and of KV memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llamaclust.model.costs import LayerCost, ModelCosts, TypedWeights


def portion(costs: ModelCosts, shares: Sequence[int], member: int) -> ModelCosts:
    """The costs of one member: products in proportion to the shares. It holds norms and the embedding whole."""
    share = shares[member] / sum(shares)
    return replace(
        costs,
        head_bytes=_part(costs.head_bytes, costs.head_weights, share),
        head_macs=round(share * costs.head_macs),
        layers=tuple(_layer(layer, share) for layer in costs.layers),
        head_weights=_typed(costs.head_weights, share),
        tied_bytes=0,
    )


def _layer(layer: LayerCost, share: float) -> LayerCost:
    def scaled(value: int) -> int:
        return round(share * value)

    divided = layer.weights + layer.expert_weights
    return replace(
        layer,
        weight_bytes=_part(layer.weight_bytes, divided, share),
        macs_per_token=scaled(layer.macs_per_token),
        kv_bytes_per_token=scaled(layer.kv_bytes_per_token),
        idle_bytes=scaled(layer.idle_bytes),
        float_macs_per_token=scaled(layer.float_macs_per_token),
        used_file_bytes=scaled(layer.used_file_bytes),
        window_bytes_per_token=scaled(layer.window_bytes_per_token),
        expert_bytes=_part(layer.expert_bytes, layer.expert_weights, share),
        expert_macs_per_token=scaled(layer.expert_macs_per_token),
        weights=_typed(layer.weights, share),
        expert_weights=_typed(layer.expert_weights, share),
    )


def _part(n_bytes: int, weights: Sequence[TypedWeights], share: float) -> int:
    """All bytes but those of rows that other members have. Without types all of them are rows."""
    rows = sum(each.n_bytes for each in weights) if weights else n_bytes
    return n_bytes - round((1 - share) * rows)


def _typed(weights: Sequence[TypedWeights], share: float) -> tuple[TypedWeights, ...]:
    return tuple(
        TypedWeights(each.quant_type, round(share * each.n_bytes), round(share * each.macs)) for each in weights
    )
