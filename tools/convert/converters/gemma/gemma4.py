"""Gemma 4. Layers with a sliding window differ from other layers in head size and number of KV heads. Experts are
parallel to the feed-forward network. Each layer may have its own embeddings. The last layers use other layers' keys and
values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.converters.gemma.layer_inputs import layer_input, projected_inputs
from llamaclust.tools.convert.lazy import constant
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
    """Sizes of heads with a window (`part`) and without (`full`). The first `own` layers compute keys and values."""

    windowed: list[bool]
    part: _Heads
    full: _Heads
    own: int
    inputs: int
    keys_are_values: bool

    def heads(self, layer: int) -> _Heads:
        return self.part if self.windowed[layer] else self.full


def build(model: ConvertedModel) -> None:
    form = _read_form(model)
    widths = _widths(model, form)
    _keys(model, form, widths)
    _rotation(model, form)
    model.output(tied=True)
    model.copy("token_embd", "model.embed_tokens", model.words, model.width)
    model.copy("output_norm", "model.norm", model.width)
    if form.inputs:
        _inputs(model, form)
    experts = _expert_keys(model) if model.settings.flag("enable_moe_block") else 0
    for layer in range(model.layers):
        _attention(model, layer, form)
        _feed_forward(model, layer, widths[layer])
        if experts:
            _experts(model, layer, experts)
        if form.inputs:
            layer_input(model, layer, form.inputs)
        model.put(f"blk.{layer}.layer_output_scale.weight", model.take(f"model.layers.{layer}.layer_scalar", 1))


def _read_form(model: ConvertedModel) -> _Form:
    settings = model.settings
    decoder.activation(model, decoder.GELU[:1], "hidden_activation")
    if settings.has("use_bidirectional_attention") and settings.text("use_bidirectional_attention") != "vision":
        raise settings.error("use_bidirectional_attention", "only null and vision are supported")
    windowed = decoder.windowed_layers(model, _PERIOD)
    shared = settings.count("num_kv_shared_layers", default=0, minimum=0, maximum=model.layers - 1)
    own = model.layers - shared
    if {*windowed[own:]} - {*windowed[:own]}:
        raise settings.error(
            "num_kv_shared_layers",
            f"{shared} is too large: each shared layer needs an unshared layer of its kind (sliding or full attention)",
        )
    alike = settings.flag("attention_k_eq_v")
    inputs = settings.count("hidden_size_per_layer_input", default=256, minimum=0, maximum=_MAX_INPUT)
    part, full = _heads(model, windowed, alike)
    return _Form(windowed, part, full, own, inputs, alike)


def _heads(model: ConvertedModel, windowed: list[bool], alike: bool) -> tuple[_Heads, _Heads]:
    settings = model.settings
    part = _Heads(model.head_width, model.kv_heads)
    if not settings.has("per_layer_config"):
        full_kv = settings.count("num_global_key_value_heads", default=part.kv_heads) if alike else part.kv_heads
        full = _Heads(settings.count("global_head_dim", default=_FULL_HEAD, maximum=_MAX_HEAD), full_kv)
    else:
        listed = settings.inner("per_layer_config")
        each = [_layer_heads(listed.inner(str(layer)), part) for layer in range(model.layers)]
        full = next((heads for heads, has_window in zip(each, windowed, strict=True) if not has_window), part)
        if each != [part if has_window else full for has_window in windowed]:
            raise settings.error(
                "per_layer_config",
                "layers of one kind (sliding or full attention) differ in head_dim or num_key_value_heads",
            )
    if model.heads % full.kv_heads:
        raise settings.error("num_global_key_value_heads", f"{full.kv_heads} does not divide {model.heads} heads")
    return part, full


def _layer_heads(layer: Settings, usual: _Heads) -> _Heads:
    return _Heads(
        layer.count("head_dim", default=usual.width, maximum=_MAX_HEAD),
        layer.count("num_key_value_heads", default=usual.kv_heads),
    )


def _widths(model: ConvertedModel, form: _Form) -> list[int]:
    width = model.settings.count("intermediate_size")
    last = 2 * width if model.settings.flag("use_double_wide_mlp") else width
    return [width] * form.own + [last] * (model.layers - form.own)


def _keys(model: ConvertedModel, form: _Form, widths: list[int]) -> None:
    settings = model.settings
    decoder.usual_keys(model, widths[0])
    if len({*widths}) > 1:
        model.key("feed_forward_length", np.array(widths, np.int32))
    if form.part.kv_heads != form.full.kv_heads:
        counts = [form.heads(layer).kv_heads for layer in range(model.layers)]
        model.key("attention.head_count_kv", np.array(counts, np.int32))
    for part in ("key", "value"):
        model.key(f"attention.{part}_length", form.full.width)
        model.key(f"attention.{part}_length_swa", form.part.width)
    decoder.rms_epsilon(model, default=1e-6)
    model.key("attention.sliding_window", settings.count("sliding_window", default=512, maximum=MAX_CONTEXT))
    model.key("attention.sliding_window_pattern", np.array(form.windowed, np.bool_))
    model.key("attention.shared_kv_layers", model.layers - form.own)
    model.key("embedding_length_per_layer_input", form.inputs)
    cap = "final_logit_softcapping"
    model.key(cap, settings.real(cap, default=0.0, maximum=MAX_CAP))  # 0 stands for no cap.


def _rotation(model: ConvertedModel, form: _Form) -> None:
    settings = model.settings
    rope = settings.inner("rope_parameters").inner("full_attention")
    usual = 1.0 if settings.inner("rope_parameters").has("full_attention") else _SHARE
    kind = rope.text("rope_type", default="proportional")
    if kind not in ("proportional", "default") or rope.real("factor", default=1.0) != 1:
        found = f"{shown(kind)}, factor {rope.shown('factor')}"
        raise rope.error("rope_type", f"expected proportional or default, in both cases with factor 1, found {found}")
    if settings.inner("rope_parameters").inner("sliding_attention").real("partial_rotary_factor", default=1.0) != 1:
        raise settings.error("rope_parameters", "partial rotation in layers with a sliding window is not supported")
    share = rope.real("partial_rotary_factor", default=usual, maximum=1.0)
    if kind == "default" and share != 1:
        raise rope.error("partial_rotary_factor", f"expected 1 if rope_type is default, found {share:g}")
    model.key("rope.freq_base", rope.real("rope_theta", default=_BASE, minimum=1.0))
    model.key("rope.freq_base_swa", local_base(settings))
    model.key("rope.dimension_count", form.full.width)
    model.key("rope.dimension_count_swa", form.part.width)
    factors = np.full(form.full.width // 2, _NOT_ROTATED)
    factors[: int(share * form.full.width // 2)] = 1
    model.put("rope_freqs.weight", constant(factors, "rope factors"))


def _attention(model: ConvertedModel, layer: int, form: _Form) -> None:
    place, source, heads = f"blk.{layer}", f"model.layers.{layer}", form.heads(layer)
    query, key = model.heads * heads.width, heads.kv_heads * heads.width
    attention = f"{source}.self_attn"
    model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
    model.copy(f"{place}.attn_q", f"{attention}.q_proj", query, model.width)
    model.copy(f"{place}.attn_q_norm", f"{attention}.q_norm", heads.width)
    model.copy(f"{place}.attn_output", f"{attention}.o_proj", model.width, query)
    model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", model.width)
    is_idle = layer >= form.own  # The authors' checkpoints may have weights that such a layer does not use.
    if not is_idle or model.has(f"{attention}.k_proj.weight"):
        model.copy(f"{place}.attn_k", f"{attention}.k_proj", key, model.width)
        model.copy(f"{place}.attn_k_norm", f"{attention}.k_norm", heads.width)
    if form.keys_are_values and not form.windowed[layer]:
        return
    if not is_idle or model.has(f"{attention}.v_proj.weight"):
        model.copy(f"{place}.attn_v", f"{attention}.v_proj", key, model.width)


def _feed_forward(model: ConvertedModel, layer: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    model.copy(f"{place}.ffn_norm", f"{source}.pre_feedforward_layernorm", model.width)
    decoder.feed_forward(model, layer, width)
    model.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", model.width)


def _expert_keys(model: ConvertedModel) -> int:
    settings = model.settings
    count = settings.count("num_experts", maximum=_MAX_EXPERTS)
    model.key("expert_count", count)
    model.key("expert_used_count", settings.count("top_k_experts", maximum=count))
    model.key("expert_feed_forward_length", settings.count("moe_intermediate_size", "expert_intermediate_size"))
    return count


def _experts(model: ConvertedModel, layer: int, count: int) -> None:
    place, source, hidden = f"blk.{layer}", f"model.layers.{layer}", model.width
    width = model.settings.count("moe_intermediate_size", "expert_intermediate_size")
    for name, norm in (
        ("post_ffw_norm_1", "post_feedforward_layernorm_1"),
        ("pre_ffw_norm_2", "pre_feedforward_layernorm_2"),
        ("post_ffw_norm_2", "post_feedforward_layernorm_2"),
    ):
        model.copy(f"{place}.{name}", f"{source}.{norm}", hidden)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.router.proj", count, hidden)
    model.put(f"{place}.ffn_gate_inp.scale", model.take(f"{source}.router.scale", hidden))
    model.put(f"{place}.ffn_down_exps.scale", model.take(f"{source}.router.per_expert_scale", count))
    model.put(
        f"{place}.ffn_gate_up_exps.weight", model.take(f"{source}.experts.gate_up_proj", count, 2 * width, hidden)
    )
    model.put(f"{place}.ffn_down_exps.weight", model.take(f"{source}.experts.down_proj", count, hidden, width))


def _inputs(model: ConvertedModel, form: _Form) -> None:
    words, width = model.settings.count("vocab_size_per_layer_input", default=model.words), model.layers * form.inputs
    if words != model.words:
        raise model.settings.error(
            "vocab_size_per_layer_input", f"expected {model.words} as in the vocabulary, found {words}"
        )
    model.copy("per_layer_token_embd", "model.embed_tokens_per_layer", model.words, width)
    projected_inputs(model, form.inputs)
