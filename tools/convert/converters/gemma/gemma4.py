"""Gemma 4. Layers with a window and layers without a window have different heads. Experts are parallel to the
feed-forward network. There are per-layer embeddings, and the last layers use other layers' keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.lazy import constant
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.pages.gemma.layer_inputs import layer_input, projected_inputs
from llamaclust.tools.convert.rotation import local_base
from llamaclust.tools.convert.settings import MAX_CAP, MAX_CONTEXT

_PERIOD = 6
_BASE, _SHARE = 1e6, 0.25  # Defaults for configurations that do not state the rotation.
_FULL_HEAD = 512
_MAX_HEAD = 1 << 12
_MAX_INPUT = 1 << 12
_MAX_EXPERTS = 1 << 10
_NOT_ROTATED = np.float32(1e30)
"""A frequency factor that leaves a pair of channels unrotated."""


@dataclass(frozen=True, slots=True)
class _Heads:
    width: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class _Form:
    """Settings that differ between layers. The first `own` layers have keys and values, which later layers reuse."""

    windowed: list[bool]
    part: _Heads
    full: _Heads
    own: int
    inputs: int
    keys_are_values: bool

    def heads(self, layer: int) -> _Heads:
        return self.part if self.windowed[layer] else self.full


def build(page: Page) -> None:
    form = _read_form(page)
    widths = _widths(page, form)
    _keys(page, form, widths)
    _rotation(page, form)
    page.output(tied=True)
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    page.copy("output_norm", "model.norm", page.width)
    if form.inputs:
        _inputs(page, form)
    experts = _expert_keys(page) if page.settings.flag("enable_moe_block") else 0
    for layer in range(page.layers):
        _attention(page, layer, form)
        _feed_forward(page, layer, widths[layer])
        if experts:
            _experts(page, layer, experts)
        if form.inputs:
            layer_input(page, layer, form.inputs)
        page.put(f"blk.{layer}.layer_output_scale.weight", page.take(f"model.layers.{layer}.layer_scalar", 1))


def _read_form(page: Page) -> _Form:
    settings = page.settings
    decoder.activation(page, decoder.GELU[:1], "hidden_activation")
    if settings.has("use_bidirectional_attention") and settings.text("use_bidirectional_attention") != "vision":
        raise settings.error("use_bidirectional_attention", "only null and vision are supported")
    windowed = decoder.windowed_layers(page, _PERIOD)
    shared = settings.count("num_kv_shared_layers", default=0, minimum=0, maximum=page.layers - 1)
    own = page.layers - shared
    if {*windowed[own:]} - {*windowed[:own]}:
        raise settings.error("num_kv_shared_layers", f"{shared} layers have no layer of their kind before them")
    alike = settings.flag("attention_k_eq_v")
    inputs = settings.count("hidden_size_per_layer_input", default=256, minimum=0, maximum=_MAX_INPUT)
    part, full = _heads(page, windowed, alike)
    return _Form(windowed, part, full, own, inputs, alike)


def _heads(page: Page, windowed: list[bool], alike: bool) -> tuple[_Heads, _Heads]:
    settings = page.settings
    part = _Heads(page.head_width, page.kv_heads)
    if not settings.has("per_layer_config"):
        full_kv = settings.count("num_global_key_value_heads", default=part.kv_heads) if alike else part.kv_heads
        full = _Heads(settings.count("global_head_dim", default=_FULL_HEAD, maximum=_MAX_HEAD), full_kv)
    else:
        listed = settings.inner("per_layer_config")
        each = [_layer_heads(listed.inner(str(layer)), part) for layer in range(page.layers)]
        full = next((heads for heads, has_window in zip(each, windowed, strict=True) if not has_window), part)
        if each != [part if has_window else full for has_window in windowed]:
            raise settings.error("per_layer_config", "layers of one kind differ in their heads")
    if page.heads % full.kv_heads:
        raise settings.error("num_global_key_value_heads", f"{full.kv_heads} does not divide {page.heads} heads")
    return part, full


def _layer_heads(layer: Settings, usual: _Heads) -> _Heads:
    return _Heads(
        layer.count("head_dim", default=usual.width, maximum=_MAX_HEAD),
        layer.count("num_key_value_heads", default=usual.kv_heads),
    )


def _widths(page: Page, form: _Form) -> list[int]:
    width = page.settings.count("intermediate_size")
    last = 2 * width if page.settings.flag("use_double_wide_mlp") else width
    return [width] * form.own + [last] * (page.layers - form.own)


def _keys(page: Page, form: _Form, widths: list[int]) -> None:
    settings = page.settings
    decoder.usual_keys(page, widths[0])
    if len({*widths}) > 1:
        page.key("feed_forward_length", np.array(widths, np.int32))
    if form.part.kv_heads != form.full.kv_heads:
        counts = [form.heads(layer).kv_heads for layer in range(page.layers)]
        page.key("attention.head_count_kv", np.array(counts, np.int32))
    for part in ("key", "value"):
        page.key(f"attention.{part}_length", form.full.width)
        page.key(f"attention.{part}_length_swa", form.part.width)
    decoder.rms_epsilon(page, default=1e-6)
    page.key("attention.sliding_window", settings.count("sliding_window", default=512, maximum=MAX_CONTEXT))
    page.key("attention.sliding_window_pattern", np.array(form.windowed, np.bool_))
    page.key("attention.shared_kv_layers", page.layers - form.own)
    page.key("embedding_length_per_layer_input", form.inputs)
    cap = "final_logit_softcapping"
    page.key(cap, settings.real(cap, default=0.0, maximum=MAX_CAP))  # 0 stands for no cap.


def _rotation(page: Page, form: _Form) -> None:
    settings = page.settings
    rope = settings.inner("rope_parameters").inner("full_attention")
    usual = 1.0 if settings.inner("rope_parameters").has("full_attention") else _SHARE
    kind = rope.text("rope_type", default="proportional")
    if kind not in ("proportional", "default") or rope.real("factor", default=1.0) != 1:
        raise rope.error(
            "rope_type", f"{shown(kind)} is not supported; supported is a proportional rotation that is not stretched"
        )
    if settings.inner("rope_parameters").inner("sliding_attention").real("partial_rotary_factor", default=1.0) != 1:
        raise settings.error("rope_parameters", "layers with a window that rotate a part of a head are not supported")
    share = rope.real("partial_rotary_factor", default=usual, maximum=1.0)
    if kind == "default" and share != 1:
        raise rope.error("partial_rotary_factor", f"{share:g} is not supported for a rotation that is not proportional")
    page.key("rope.freq_base", rope.real("rope_theta", default=_BASE, minimum=1.0))
    page.key("rope.freq_base_swa", local_base(settings))
    page.key("rope.dimension_count", form.full.width)
    page.key("rope.dimension_count_swa", form.part.width)
    factors = np.full(form.full.width // 2, _NOT_ROTATED)
    factors[: int(share * form.full.width // 2)] = 1
    page.put("rope_freqs.weight", constant(factors, "rope factors"))


def _attention(page: Page, layer: int, form: _Form) -> None:
    place, source, heads = f"blk.{layer}", f"model.layers.{layer}", form.heads(layer)
    query, key = page.heads * heads.width, heads.kv_heads * heads.width
    attention = f"{source}.self_attn"
    page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
    page.copy(f"{place}.attn_q", f"{attention}.q_proj", query, page.width)
    page.copy(f"{place}.attn_q_norm", f"{attention}.q_norm", heads.width)
    page.copy(f"{place}.attn_output", f"{attention}.o_proj", page.width, query)
    page.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", page.width)
    is_idle = layer >= form.own  # The authors' checkpoints may have weights that such a layer does not use.
    if not is_idle or page.has(f"{attention}.k_proj.weight"):
        page.copy(f"{place}.attn_k", f"{attention}.k_proj", key, page.width)
        page.copy(f"{place}.attn_k_norm", f"{attention}.k_norm", heads.width)
    if form.keys_are_values and not form.windowed[layer]:
        return
    if not is_idle or page.has(f"{attention}.v_proj.weight"):
        page.copy(f"{place}.attn_v", f"{attention}.v_proj", key, page.width)


def _feed_forward(page: Page, layer: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    page.copy(f"{place}.ffn_norm", f"{source}.pre_feedforward_layernorm", page.width)
    decoder.feed_forward(page, layer, width)
    page.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", page.width)


def _expert_keys(page: Page) -> int:
    settings = page.settings
    count = settings.count("num_experts", maximum=_MAX_EXPERTS)
    page.key("expert_count", count)
    page.key("expert_used_count", settings.count("top_k_experts", maximum=count))
    page.key("expert_feed_forward_length", settings.count("moe_intermediate_size", "expert_intermediate_size"))
    return count


def _experts(page: Page, layer: int, count: int) -> None:
    place, source, hidden = f"blk.{layer}", f"model.layers.{layer}", page.width
    width = page.settings.count("moe_intermediate_size", "expert_intermediate_size")
    for name, norm in (
        ("post_ffw_norm_1", "post_feedforward_layernorm_1"),
        ("pre_ffw_norm_2", "pre_feedforward_layernorm_2"),
        ("post_ffw_norm_2", "post_feedforward_layernorm_2"),
    ):
        page.copy(f"{place}.{name}", f"{source}.{norm}", hidden)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.router.proj", count, hidden)
    page.put(f"{place}.ffn_gate_inp.scale", page.take(f"{source}.router.scale", hidden))
    page.put(f"{place}.ffn_down_exps.scale", page.take(f"{source}.router.per_expert_scale", count))
    page.put(f"{place}.ffn_gate_up_exps.weight", page.take(f"{source}.experts.gate_up_proj", count, 2 * width, hidden))
    page.put(f"{place}.ffn_down_exps.weight", page.take(f"{source}.experts.down_proj", count, hidden, width))


def _inputs(page: Page, form: _Form) -> None:
    words, width = page.settings.count("vocab_size_per_layer_input", default=page.words), page.layers * form.inputs
    if words != page.words:
        raise page.settings.error(
            "vocab_size_per_layer_input", f"expected {page.words} as in the vocabulary, found {words}"
        )
    page.copy("per_layer_token_embd", "model.embed_tokens_per_layer", page.words, width)
    projected_inputs(page, form.inputs)
