from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.layers import EMBEDDING
from llamaclust.model.costs import LayerCost, ModelCosts, layer_cost
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import nextn_program


def with_nextn(model: Model, costs: ModelCosts, kv_type: KvType) -> ModelCosts:
    """Returns the costs with the model's MTP head added, mostly to the last layer. `costs` must not divide layers into
    expert shards."""
    program = nextn_program(model, kv_type)
    own = layer_cost(model.file.tensors, program)
    held = {*model.program(model.layer_count - 1, model.layer_count).weights}
    added_bytes = {name: model.file.tensor(name).resident_bytes for name in program.weights if name not in held}
    embedding_bytes = added_bytes.get(EMBEDDING, 0)
    *others, last = costs.layers
    return replace(
        costs,
        nextn_bytes=sum(added_bytes.values()) - own.weight_bytes - embedding_bytes,
        nextn_embedding_bytes=embedding_bytes,
        layers=(*others, _together(last, own)),
    )


def _together(last: LayerCost, own: LayerCost) -> LayerCost:
    return replace(
        last,
        weight_bytes=last.weight_bytes + own.weight_bytes,
        macs_per_token=last.macs_per_token + own.macs_per_token,
        kv_bytes_per_token=last.kv_bytes_per_token + own.kv_bytes_per_token,
        idle_bytes=last.idle_bytes + own.idle_bytes,
        idle_share=max(last.idle_share, own.idle_share),
        float_macs_per_token=last.float_macs_per_token + own.float_macs_per_token,
        used_file_bytes=last.used_file_bytes + own.used_file_bytes,
        expert_bytes=last.expert_bytes + own.expert_bytes,
        expert_macs_per_token=last.expert_macs_per_token + own.expert_macs_per_token,
        weights=(*last.weights, *own.weights),
        expert_weights=(*last.expert_weights, *own.expert_weights),
    )
