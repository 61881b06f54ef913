"""Gemma 3n. It has several hidden states (AltUp), a low-rank branch parallel to attention (LAuReL), sparse activations,
and per-layer embeddings. Its last layers use the keys and values of other layers."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from llamaclust.model.checkpoints.settings import MAX_WIDTH
from llamaclust.tools.convert.lazy import gathered, stacked
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.pages.gemma.layer_inputs import layer_input, projected_inputs
from llamaclust.tools.convert.rotation import local_base, rotation
from llamaclust.tools.convert.settings import MAX_CAP, MAX_CONTEXT, MAX_WORDS

_PERIOD = 5
_SPARSE_LAYERS, _SPARSITY = 10, 0.95  # Defaults for configurations without the setting.
_TABLE_WORDS = 262144
_MAX_COPIES = 16
_MAX_INPUT = 1 << 12


def build(page: Page) -> None:
    settings = page.settings
    decoder.activation(page, decoder.GELU[:1], "hidden_activation")
    if not settings.flag("altup_correct_scale", default=True):
        raise settings.error("altup_correct_scale", "false is not supported by gemma3n")
    widths, copies = _widths(page), settings.count("altup_num_inputs", default=4, minimum=2, maximum=_MAX_COPIES)
    inputs = settings.count("hidden_size_per_layer_input", default=256, maximum=_MAX_INPUT)
    rank = settings.count("laurel_rank", default=64)
    shared = _keys(page, widths, copies, inputs)
    page.output(tied=True)
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    page.copy("output_norm", "model.norm", page.width)
    for name, source in (("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections")):
        shape = page.width, page.width
        matrices = [page.take(f"model.{source}.{number}.weight", *shape) for number in range(copies - 1)]
        page.put(f"{name}.weight", stacked(matrices))
    _table(page, page.layers * inputs)
    projected_inputs(page, inputs)
    for layer in range(page.layers):
        _attention(page, layer, is_idle=layer >= page.layers - shared)
        _altup(page, layer, copies, rank)
        _feed_forward(page, layer, widths[layer])
        layer_input(page, layer, inputs)


def _widths(page: Page) -> list[int]:
    listed = page.settings.values.get("intermediate_size")
    if not isinstance(listed, list):
        return [page.settings.count("intermediate_size")] * page.layers
    if len(listed) != page.layers or not all(type(width) is int and 0 < width <= MAX_WIDTH for width in listed):
        raise page.settings.error("intermediate_size", f"expected {page.layers} widths, found {len(listed)} entries")
    return listed


def _keys(page: Page, widths: list[int], copies: int, inputs: int) -> int:
    settings = page.settings
    decoder.usual_keys(page, widths[0])
    if len({*widths}) > 1:
        page.key("feed_forward_length", np.array(widths, np.int32))
    for part in ("key", "value"):
        page.key(f"attention.{part}_length", settings.count("head_dim", default=256, maximum=1 << 12))
    decoder.rms_epsilon(page, default=1e-6)
    rotation(page, page.head_width, base=1e6, says_dimensions=False)
    page.key("rope.freq_base_swa", local_base(settings))
    windowed = decoder.windowed_layers(page, _PERIOD)
    shared = settings.count("num_kv_shared_layers", default=15, minimum=0, maximum=page.layers - 1)
    own = page.layers - shared
    if {*windowed[own:]} - {*windowed[:own]}:
        raise settings.error("num_kv_shared_layers", f"{shared} layers have no layer of their kind before them")
    page.key("attention.shared_kv_layers", shared)
    page.key("attention.sliding_window", settings.count("sliding_window", default=512, maximum=MAX_CONTEXT))
    page.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))
    page.key("activation_sparsity_scale", np.array(_sparsity(page), np.float32))
    page.key("altup.active_idx", settings.count("altup_active_idx", default=0, minimum=0, maximum=copies - 1))
    page.key("altup.num_inputs", copies)
    page.key("embedding_length_per_layer_input", inputs)
    cap = "final_logit_softcapping"
    page.key(cap, settings.real(cap, default=30.0, minimum=1e-3, maximum=MAX_CAP))
    return shared


def _sparsity(page: Page) -> list[float]:
    """Returns each layer's threshold of activations, in standard deviations above the mean. If the threshold is -inf,
    all activations pass."""
    name, sparse = "activation_sparsity_pattern", _SPARSE_LAYERS if page.layers > _SPARSE_LAYERS else 0
    shares = page.settings.values.get(name)
    if shares is None:
        shares = [_SPARSITY] * sparse + [0.0] * (page.layers - sparse)
    if not isinstance(shares, list) or len(shares) != page.layers:
        raise page.settings.error(name, f"expected a share for each of {page.layers} layers")
    if not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
        raise page.settings.error(name, "expected shares from 0 to below 1")
    return [NormalDist().inv_cdf(share) if share else -math.inf for share in shares]


def _table(page: Page, width: int) -> None:
    words = page.settings.count("vocab_size_per_layer_input", default=_TABLE_WORDS, maximum=MAX_WORDS)
    table = page.take("model.embed_tokens_per_layer.weight", words, width)
    tokens = np.arange(page.words, dtype=np.int64)
    page.put(
        "per_layer_token_embd.weight",
        table if words == page.words else gathered(table, np.where(tokens < words, tokens, 0)),
    )


def _attention(page: Page, layer: int, *, is_idle: bool) -> None:
    """Copies attention. An idle layer uses another layer's keys and values, even if it has its own weights for them."""
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    attention, query, key = f"{source}.self_attn", page.heads * page.head_width, page.kv_heads * page.head_width
    page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
    page.copy(f"{place}.attn_q", f"{attention}.q_proj", query, page.width)
    page.copy(f"{place}.attn_q_norm", f"{attention}.q_norm", page.head_width)
    page.copy(f"{place}.attn_output", f"{attention}.o_proj", page.width, query)
    page.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", page.width)
    for part, shape in (("k_proj", (key, page.width)), ("v_proj", (key, page.width)), ("k_norm", (page.head_width,))):
        if not is_idle or page.has(f"{attention}.{part}.weight"):
            page.copy(f"{place}.attn_{part.removesuffix('_proj')}", f"{attention}.{part}", *shape)


def _altup(page: Page, layer: int, copies: int, rank: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    page.copy(f"{place}.altup_router", f"{source}.altup.modality_router", copies, page.width)
    page.copy(f"{place}.altup_router_norm", f"{source}.altup.router_norm", page.width)
    page.copy(f"{place}.altup_predict_coef", f"{source}.altup.prediction_coefs", copies**2, copies)
    page.copy(f"{place}.altup_correct_coef", f"{source}.altup.correction_coefs", copies, copies)
    scale = page.take(f"{source}.altup.correct_output_scale", page.width)
    page.put(f"{place}.altup_correct_scale.weight", scale)
    page.copy(f"{place}.laurel_l", f"{source}.laurel.linear_left", rank, page.width)
    page.copy(f"{place}.laurel_r", f"{source}.laurel.linear_right", page.width, rank)
    page.copy(f"{place}.laurel_post_norm", f"{source}.laurel.post_laurel_norm", page.width)


def _feed_forward(page: Page, layer: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    page.copy(f"{place}.ffn_norm", f"{source}.pre_feedforward_layernorm", page.width)
    decoder.feed_forward(page, layer, width)
    page.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", page.width)
