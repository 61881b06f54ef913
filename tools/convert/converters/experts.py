"""Functions that pages of mixture-of-experts models share, for metadata, matrices, dense layers and MTP layers."""

from __future__ import annotations

from typing import Final

from llamaclust.tools.convert.lazy import exchanged, part_of_each
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.settings import MAX_LAYERS

MAX_EXPERTS: Final = 1 << 10
PARTS: Final = ("gate_proj", "up_proj", "down_proj")
SOFTMAX, SIGMOID = 1, 2
NO_PREDICTIONS: Final = "layers that predict further tokens are not written"


def expert_keys(page: Page, count: int, used: int, width: int) -> None:
    page.key("expert_count", count)
    page.key("expert_used_count", used)
    page.key("expert_feed_forward_length", width)


def weight_keys(page: Page, gating: int, *, normalized: bool) -> None:
    settings = page.settings
    page.key("expert_gating_func", gating)
    page.key("expert_weights_scale", settings.real("routed_scaling_factor", default=1.0, minimum=1e-6, maximum=1e6))
    page.key("expert_weights_norm", settings.flag("norm_topk_prob", "moe_renormalize", default=normalized))


def group_keys(page: Page, count: int, chosen: int) -> None:
    """Writes the metadata of expert groups. A model chooses experts only from the groups with the highest scores."""
    settings = page.settings
    groups = settings.count("n_group", "num_expert_group", default=1, maximum=count)
    used = settings.count("topk_group", default=1, maximum=groups)
    if groups == 1:
        return
    if count % groups or count // groups < 2:
        raise settings.error("n_group", f"{groups} does not divide {count} experts into groups of 2 or more")
    if chosen > used * (count // groups):
        raise settings.error("topk_group", f"{used} of {groups} groups are too few for {chosen} of {count} experts")
    page.key("expert_group_count", groups)
    page.key("expert_group_used_count", used)


def matrices(page: Page, place: str, source: str, count: int, width: int, names: tuple[str, str, str] = PARTS) -> None:
    """Writes the expert matrices gate, up and down, from tensors of single experts or of all experts."""
    if not page.has(f"{source}.gate_up_proj"):
        decoder.experts(page, place, count, width, names, source)
        return
    both = page.take(f"{source}.gate_up_proj", count, 2 * width, page.width)
    for first, part in enumerate(("gate", "up")):
        page.put(f"{place}.ffn_{part}_exps.weight", part_of_each(both, first * width, (first + 1) * width))
    page.put(f"{place}.ffn_down_exps.weight", page.take(f"{source}.down_proj", count, page.width, width))


def column_matrices(page: Page, place: str, source: str, count: int, width: int) -> None:
    """Writes the expert matrices gate, up and down, from transposed tensors of all experts."""
    both = exchanged(page.take(f"{source}.gate_up_proj", count, page.width, 2 * width))
    page.put(f"{place}.ffn_gate_exps.weight", part_of_each(both, 0, width))
    page.put(f"{place}.ffn_up_exps.weight", part_of_each(both, width, 2 * width))
    page.put(f"{place}.ffn_down_exps.weight", exchanged(page.take(f"{source}.down_proj", count, width, page.width)))


def leading_dense(page: Page) -> int:
    """Returns the number of leading layers without experts. Raises ModelFileError if another layer has no experts."""
    settings, layers = page.settings, page.layers
    listed = settings.values.get("mlp_layer_types")
    if isinstance(listed, list):
        count = listed.count("dense")
        if listed != ["dense"] * count + ["sparse"] * (layers - count):
            raise settings.error("mlp_layer_types", f"expected {layers} entries: dense ones first, then sparse ones")
        return count
    if settings.count("moe_layer_freq", default=1) != 1:
        raise settings.error("moe_layer_freq", f"{settings.shown('moe_layer_freq')} is not supported; supported is 1")
    return settings.count("first_k_dense_replace", default=0, minimum=0, maximum=MAX_LAYERS)


def further_layers(page: Page) -> int:
    count = page.settings.count("num_nextn_predict_layers", default=0, minimum=0, maximum=MAX_LAYERS)
    return count if count and page.has(f"model.layers.{page.layers}.eh_proj.weight") else 0


def leave_further_layers(page: Page) -> None:
    count = page.settings.count("num_nextn_predict_layers", default=1, minimum=0, maximum=MAX_LAYERS)
    behind = [f"model.layers.{page.layers + number}." for number in range(count)]
    behind = [prefix for prefix in behind if page.has(f"{prefix}eh_proj.weight")]
    if behind and page.leave(*behind):
        page.notes.append(NO_PREDICTIONS)


def prediction(page: Page, layer: int) -> None:
    place, source, hidden = f"blk.{layer}.nextn", f"model.layers.{layer}", page.width
    page.copy(f"{place}.eh_proj", f"{source}.eh_proj", hidden, 2 * hidden)
    page.copy(f"{place}.enorm", f"{source}.enorm", hidden)
    page.copy(f"{place}.hnorm", f"{source}.hnorm", hidden)
    page.copy(f"{place}.shared_head_norm", f"{source}.shared_head.norm", hidden)
    for name, module in (("embed_tokens", "embed_tokens"), ("shared_head_head", "shared_head.head")):
        if page.has(f"{source}.{module}.weight"):
            page.copy(f"{place}.{name}", f"{source}.{module}", page.words, hidden)
