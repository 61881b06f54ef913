"""Computes the memory that a model needs, and the number of layers or tokens of context that fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import CONTEXT_TOKENS, capacity_of, kv_tokens
from llamaclust.cluster.launchers.models.projectors import open_with_projector
from llamaclust.cluster.scheduler.capacity import BlockCounts, blocks_of
from llamaclust.cluster.scheduler.kv.groups import KvGroups, KvSizes
from llamaclust.core.limits import StageLimits
from llamaclust.model.costs import ModelCosts
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.worker.devices.workspace import planned_workspace_bytes
from llamaclust.worker.stage.stage_runner import model_program


@dataclass(frozen=True, slots=True)
class Fit:
    """Memory that a model needs on one CPU worker, and the part of the model that fits into `available_bytes`."""

    available_bytes: int
    weight_bytes: int  # Size of the weights as packed for the kernels, which differs from their size in the file.
    layer_bytes: tuple[int, ...]
    kv_bytes_per_token: dict[str, int]  # Bytes of all layers, by KV type.
    state_bytes: int  # Bytes of one sequence's recurrent state in all layers.
    workspace_bytes: int
    context_length: int  # Context length of a sequence in the following values.
    total_bytes: int  # Memory of all layers with KV memory for `kv_tokens` tokens, without an image encoder.
    kv_tokens: int
    least_bytes: int  # Memory of all layers with KV memory for one sequence.
    layers: int  # Number of first layers that fit with the embedding. If all fit, the head fits, too.
    most_context: int  # Longest context that fits with all layers. 0 if the layers do not fit.

    @property
    def is_whole(self) -> bool:
        return self.least_bytes <= self.available_bytes

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.is_whole}


def fit(path: Path, available_bytes: int, threads: int, context_length: int | None = None) -> Fit:
    """Computes the memory of one worker with the defaults of a cluster file. Reads only headers of the model file.
    `context_length` is limited to the model's context length. Raises ModelFileError if the model cannot run."""
    model, _ = open_with_projector(path, None)
    with model:
        config = ClusterConfig.model_validate({"model": str(path), "workers": [{"name": "a"}]})
        trained, count = model.hyperparameters.context_length, model.layer_count
        context = min(context_length or CONTEXT_TOKENS, trained)
        costs = {kv_type: model.costs(kv_type) for kv_type in KvType}

        def limits(tokens: int) -> StageLimits:
            return capacity_of(config, tokens, model).stage_limits(BlockCounts(blocks_of(tokens)))

        def weights(layers: int) -> int:
            tensors = model.tensors_for(model_program(model, 0, layers, limits(KV_BLOCK_TOKENS)))
            return sum(tensor.resident_bytes for tensor in tensors.values())

        def workspace(layers: int, tokens: int) -> int:
            return planned_workspace_bytes(model, 0, layers, limits(tokens), threads)

        def needed(layers: int, tokens: int, kv_tokens: int) -> int:
            groups = capacity_of(config, tokens, model).groups(costs[KvType.F16])
            kv_bytes = _kv_bytes(groups, costs[KvType.F16], layers, kv_tokens)
            return weights(layers) + workspace(layers, tokens) + kv_bytes

        usual = min(config.max_sequences * context, max(context, kv_tokens(config) or 0))
        return Fit(
            available_bytes=available_bytes,
            weight_bytes=weights(count),
            layer_bytes=tuple(layer.weight_bytes for layer in costs[KvType.F16].layers),
            kv_bytes_per_token={str(kind): each.kv_token_bytes for kind, each in costs.items()},
            state_bytes=costs[KvType.F16].state_bytes,
            workspace_bytes=workspace(count, context),
            context_length=context,
            total_bytes=needed(count, context, usual),
            kv_tokens=usual,
            least_bytes=needed(count, context, context),
            layers=_most(count, lambda layers: needed(layers, context, context) > available_bytes),
            most_context=_most(trained, lambda tokens: needed(count, tokens, tokens) > available_bytes),
        )


def _kv_bytes(groups: KvGroups, costs: ModelCosts, layers: int, kv_tokens: int) -> int:
    first = costs.layers[:layers]
    sizes = KvSizes(
        token_bytes=sum(layer.kv_bytes_per_token for layer in first),
        window_token_bytes=sum(layer.window_bytes_per_token for layer in first),
        state_bytes=sum(layer.state_bytes for layer in first),
    )
    return groups.kv_bytes(sizes, blocks_of(kv_tokens))


def _most(count: int, exceeds: Callable[[int], bool]) -> int:
    return bisect_left(range(1, count + 1), True, key=exceeds)
