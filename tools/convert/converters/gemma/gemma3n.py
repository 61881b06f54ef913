"""Gemma 3n. It has several hidden states (AltUp), a low-rank branch parallel to attention (LAuReL), sparse activations,
and per-layer embeddings. Its last layers use the keys and values of other layers."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from llamaclust.model.checkpoints.settings import MAX_WIDTH
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.converters.gemma.layer_inputs import layer_input, projected_inputs
from llamaclust.tools.convert.lazy import gathered, stacked
from llamaclust.tools.convert.rotation import local_base, rotation
from llamaclust.tools.convert.settings import MAX_CAP, MAX_CONTEXT, MAX_WORDS

_PERIOD = 5
_SPARSE_LAYERS, _SPARSITY = 10, 0.95  # Defaults for configurations without the setting.
_TABLE_WORDS = 262144
_MAX_COPIES = 16
_MAX_INPUT = 1 << 12


def build(model: ConvertedModel) -> None:
    settings = model.settings
    decoder.activation(model, decoder.GELU[:1], "hidden_activation")
    if not settings.flag("altup_correct_scale", default=True):
        raise settings.error("altup_correct_scale", "false is not supported by gemma3n")
    widths, copies = _widths(model), settings.count("altup_num_inputs", default=4, minimum=2, maximum=_MAX_COPIES)
    inputs = settings.count("hidden_size_per_layer_input", default=256, maximum=_MAX_INPUT)
    rank = settings.count("laurel_rank", default=64)
    shared = _keys(model, widths, copies, inputs)
    model.output(tied=True)
    model.copy("token_embd", "model.embed_tokens", model.words, model.width)
    model.copy("output_norm", "model.norm", model.width)
    for name, source in (("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections")):
        shape = model.width, model.width
        matrices = [model.take(f"model.{source}.{number}.weight", *shape) for number in range(copies - 1)]
        model.put(f"{name}.weight", stacked(matrices))
    _table(model, model.layers * inputs)
    projected_inputs(model, inputs)
    for layer in range(model.layers):
        _attention(model, layer, is_idle=layer >= model.layers - shared)
        _altup(model, layer, copies, rank)
        _feed_forward(model, layer, widths[layer])
        layer_input(model, layer, inputs)


def _widths(model: ConvertedModel) -> list[int]:
    listed = model.settings.values.get("intermediate_size")
    if not isinstance(listed, list):
        return [model.settings.count("intermediate_size")] * model.layers
    if len(listed) != model.layers or not all(type(width) is int and 0 < width <= MAX_WIDTH for width in listed):
        what = f"expected {model.layers} widths of 1 to {MAX_WIDTH}, found {len(listed)}"
        raise model.settings.error("intermediate_size", f"{what}: {model.settings.shown('intermediate_size')}")
    return listed


def _keys(model: ConvertedModel, widths: list[int], copies: int, inputs: int) -> int:
    settings = model.settings
    decoder.usual_keys(model, widths[0])
    if len({*widths}) > 1:
        model.key("feed_forward_length", np.array(widths, np.int32))
    for part in ("key", "value"):
        model.key(f"attention.{part}_length", settings.count("head_dim", default=256, maximum=1 << 12))
    decoder.rms_epsilon(model, default=1e-6)
    rotation(model, model.head_width, base=1e6, says_dimensions=False)
    model.key("rope.freq_base_swa", local_base(settings))
    windowed = decoder.windowed_layers(model, _PERIOD)
    shared = settings.count("num_kv_shared_layers", default=15, minimum=0, maximum=model.layers - 1)
    own = model.layers - shared
    if {*windowed[own:]} - {*windowed[:own]}:
        raise settings.error(
            "num_kv_shared_layers",
            f"{shared} is too large: each shared layer needs an unshared layer of its kind (sliding or full attention)",
        )
    model.key("attention.shared_kv_layers", shared)
    model.key("attention.sliding_window", settings.count("sliding_window", default=512, maximum=MAX_CONTEXT))
    model.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))
    model.key("activation_sparsity_scale", np.array(_sparsity(model), np.float32))
    model.key("altup.active_idx", settings.count("altup_active_idx", default=0, minimum=0, maximum=copies - 1))
    model.key("altup.num_inputs", copies)
    model.key("embedding_length_per_layer_input", inputs)
    cap = "final_logit_softcapping"
    model.key(cap, settings.real(cap, default=30.0, minimum=1e-3, maximum=MAX_CAP))
    return shared


def _sparsity(model: ConvertedModel) -> list[float]:
    """Returns each layer's activation threshold, in standard deviations above the mean. -inf keeps all activations."""
    name, sparse = "activation_sparsity_pattern", _SPARSE_LAYERS if model.layers > _SPARSE_LAYERS else 0
    shares = model.settings.values.get(name)
    if shares is None:
        shares = [_SPARSITY] * sparse + [0.0] * (model.layers - sparse)
    if not isinstance(shares, list) or len(shares) != model.layers:
        raise model.settings.error(name, f"expected a list of {model.layers} shares, one for each layer")
    if not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
        raise model.settings.error(name, "expected shares from 0 to below 1")
    return [NormalDist().inv_cdf(share) if share else -math.inf for share in shares]


def _table(model: ConvertedModel, width: int) -> None:
    words = model.settings.count("vocab_size_per_layer_input", default=_TABLE_WORDS, maximum=MAX_WORDS)
    table = model.take("model.embed_tokens_per_layer.weight", words, width)
    tokens = np.arange(model.words, dtype=np.int64)
    model.put(
        "per_layer_token_embd.weight",
        table if words == model.words else gathered(table, np.where(tokens < words, tokens, 0)),
    )


def _attention(model: ConvertedModel, layer: int, *, is_idle: bool) -> None:
    """Copies attention. If `is_idle`, the layer uses another layer's keys and values, and may lack its own weights."""
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    attention, query, key = f"{source}.self_attn", model.heads * model.head_width, model.kv_heads * model.head_width
    model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
    model.copy(f"{place}.attn_q", f"{attention}.q_proj", query, model.width)
    model.copy(f"{place}.attn_q_norm", f"{attention}.q_norm", model.head_width)
    model.copy(f"{place}.attn_output", f"{attention}.o_proj", model.width, query)
    model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", model.width)
    for part, shape in (
        ("k_proj", (key, model.width)),
        ("v_proj", (key, model.width)),
        ("k_norm", (model.head_width,)),
    ):
        if not is_idle or model.has(f"{attention}.{part}.weight"):
            model.copy(f"{place}.attn_{part.removesuffix('_proj')}", f"{attention}.{part}", *shape)


def _altup(model: ConvertedModel, layer: int, copies: int, rank: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    model.copy(f"{place}.altup_router", f"{source}.altup.modality_router", copies, model.width)
    model.copy(f"{place}.altup_router_norm", f"{source}.altup.router_norm", model.width)
    model.copy(f"{place}.altup_predict_coef", f"{source}.altup.prediction_coefs", copies**2, copies)
    model.copy(f"{place}.altup_correct_coef", f"{source}.altup.correction_coefs", copies, copies)
    scale = model.take(f"{source}.altup.correct_output_scale", model.width)
    model.put(f"{place}.altup_correct_scale.weight", scale)
    model.copy(f"{place}.laurel_l", f"{source}.laurel.linear_left", rank, model.width)
    model.copy(f"{place}.laurel_r", f"{source}.laurel.linear_right", model.width, rank)
    model.copy(f"{place}.laurel_post_norm", f"{source}.laurel.post_laurel_norm", model.width)


def _feed_forward(model: ConvertedModel, layer: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    model.copy(f"{place}.ffn_norm", f"{source}.pre_feedforward_layernorm", model.width)
    decoder.feed_forward(model, layer, width)
    model.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", model.width)
