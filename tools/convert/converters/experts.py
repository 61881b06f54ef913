"""Functions that converters of mixture-of-experts models share, for metadata, matrices, dense layers and MTP layers."""

from __future__ import annotations

from typing import Final

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.lazy import exchanged, part_of_each
from llamaclust.tools.convert.settings import MAX_LAYERS

MAX_EXPERTS: Final = 1 << 10
PARTS: Final = ("gate_proj", "up_proj", "down_proj")
SOFTMAX, SIGMOID = 1, 2
NO_PREDICTIONS: Final = "layers that predict further tokens are not written"


def expert_keys(model: ConvertedModel, count: int, used: int, width: int) -> None:
    model.key("expert_count", count)
    model.key("expert_used_count", used)
    model.key("expert_feed_forward_length", width)


def weight_keys(model: ConvertedModel, gating: int, *, normalized: bool) -> None:
    settings = model.settings
    model.key("expert_gating_func", gating)
    model.key("expert_weights_scale", settings.real("routed_scaling_factor", default=1.0, minimum=1e-6, maximum=1e6))
    model.key("expert_weights_norm", settings.flag("norm_topk_prob", "moe_renormalize", default=normalized))


def group_keys(model: ConvertedModel, count: int, chosen: int) -> None:
    """Writes the metadata of expert groups. A model chooses experts only from the groups with the highest scores."""
    settings = model.settings
    groups = settings.count("n_group", "num_expert_group", default=1, maximum=count)
    used = settings.count("topk_group", default=1, maximum=groups)
    if groups == 1:
        return
    if count % groups or count // groups < 2:
        raise settings.error("n_group", f"{groups} does not divide {count} experts into groups of 2 or more")
    if chosen > used * (count // groups):
        what = f"{used} with {count // groups} experts per group is too few to choose {chosen} experts"
        raise settings.error("topk_group", what)
    model.key("expert_group_count", groups)
    model.key("expert_group_used_count", used)


def matrices(
    model: ConvertedModel, place: str, source: str, count: int, width: int, names: tuple[str, str, str] = PARTS
) -> None:
    """Writes the expert matrices gate, up and down. The checkpoint's experts are separate or stacked."""
    if not model.has(f"{source}.gate_up_proj"):
        decoder.experts(model, place, count, width, names, source)
        return
    both = model.take(f"{source}.gate_up_proj", count, 2 * width, model.width)
    for first, part in enumerate(("gate", "up")):
        model.put(f"{place}.ffn_{part}_exps.weight", part_of_each(both, first * width, (first + 1) * width))
    model.put(f"{place}.ffn_down_exps.weight", model.take(f"{source}.down_proj", count, model.width, width))


def column_matrices(model: ConvertedModel, place: str, source: str, count: int, width: int) -> None:
    """Writes the expert matrices gate, up and down. The checkpoint's experts are stacked and transposed."""
    both = exchanged(model.take(f"{source}.gate_up_proj", count, model.width, 2 * width))
    model.put(f"{place}.ffn_gate_exps.weight", part_of_each(both, 0, width))
    model.put(f"{place}.ffn_up_exps.weight", part_of_each(both, width, 2 * width))
    model.put(f"{place}.ffn_down_exps.weight", exchanged(model.take(f"{source}.down_proj", count, width, model.width)))


def leading_dense(model: ConvertedModel) -> int:
    """Returns the number of leading layers without experts. Raises ModelFileError if a later layer has none."""
    settings, layers = model.settings, model.layers
    listed = settings.values.get("mlp_layer_types")
    if isinstance(listed, list):
        count = listed.count("dense")
        if listed != ["dense"] * count + ["sparse"] * (layers - count):
            raise settings.error("mlp_layer_types", f"expected {layers} entries: dense ones first, then sparse ones")
        return count
    if settings.count("moe_layer_freq", default=1) != 1:
        raise settings.error("moe_layer_freq", f"{settings.shown('moe_layer_freq')} is not supported; expected 1")
    return settings.count("first_k_dense_replace", default=0, minimum=0, maximum=MAX_LAYERS)


def further_layers(model: ConvertedModel) -> int:
    count = model.settings.count("num_nextn_predict_layers", default=0, minimum=0, maximum=MAX_LAYERS)
    return count if count and model.has(f"model.layers.{model.layers}.eh_proj.weight") else 0


def leave_further_layers(model: ConvertedModel) -> None:
    count = model.settings.count("num_nextn_predict_layers", default=1, minimum=0, maximum=MAX_LAYERS)
    behind = [f"model.layers.{model.layers + number}." for number in range(count)]
    behind = [prefix for prefix in behind if model.has(f"{prefix}eh_proj.weight")]
    if behind and model.leave(*behind):
        model.notes.append(NO_PREDICTIONS)


def prediction(model: ConvertedModel, layer: int) -> None:
    place, source, hidden = f"blk.{layer}.nextn", f"model.layers.{layer}", model.width
    model.copy(f"{place}.eh_proj", f"{source}.eh_proj", hidden, 2 * hidden)
    model.copy(f"{place}.enorm", f"{source}.enorm", hidden)
    model.copy(f"{place}.hnorm", f"{source}.hnorm", hidden)
    model.copy(f"{place}.shared_head_norm", f"{source}.shared_head.norm", hidden)
    for name, module in (("embed_tokens", "embed_tokens"), ("shared_head_head", "shared_head.head")):
        if model.has(f"{source}.{module}.weight"):
            model.copy(f"{place}.{name}", f"{source}.{module}", model.words, hidden)
