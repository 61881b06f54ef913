"""The text model of Llama 4. Three of four layers have RoPE and attend to a chunk of positions. RoPE pairs neighbouring
channels, in the checkpoint and in GGUF. Every layer, or every second layer, has experts."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_LAYERS

_BASE = 500000.0
_PERIOD = 4
_CHUNK = 8192
_TEMPERATURE = (("attn_scale", 0.1), ("floor_scale", 8192))
_MAVERICK_EXPERTS = 128


def build(model: ConvertedModel) -> None:
    settings = model.settings
    decoder.activation(model, decoder.SILU, "hidden_act")
    width = settings.count("intermediate_size_mlp", default=16384)
    count, step = settings.count("num_local_experts", maximum=experts.MAX_EXPERTS), _step(model)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-5)
    rotation(model, model.head_width, base=_BASE)
    _check_attention(model, count)
    _chunks(model)
    model.key("interleave_moe_layer_step", step)
    used = settings.count("num_experts_per_tok", default=1, maximum=count)
    experts.expert_keys(model, count, used, settings.count("intermediate_size"))
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        if (layer + 1) % step == 0:
            _experts(model, layer, count, settings.count("intermediate_size"))
        else:
            decoder.feed_forward(model, layer, width, source="feed_forward")


def _step(model: ConvertedModel) -> int:
    settings = model.settings
    listed = settings.values.get("moe_layers")
    if listed is None:
        return settings.count("interleave_moe_layer_step", default=1, maximum=MAX_LAYERS)
    for found in range(1, model.layers + 1):
        if listed == list(range(found - 1, model.layers, found)):
            return found
    raise settings.error("moe_layers", f"expected experts in every n-th layer, found {settings.shown('moe_layers')}")


def _check_attention(model: ConvertedModel, count: int) -> None:
    """Raises ModelFileError if GGUF cannot express the norms of Q and K, or the scales of queries."""
    settings = model.settings
    has_norms = settings.flag("use_qk_norm", default=True)
    if has_norms != (count != _MAVERICK_EXPERTS):
        stated = "true" if has_norms else "false"
        why = f"Q and K have norms in all models except those with {_MAVERICK_EXPERTS} experts"
        raise settings.error("use_qk_norm", f"{stated} is not supported for {count} experts: {why}")
    if settings.values.get("attn_temperature_tuning", True) in (None, False, 0):
        raise settings.error("attn_temperature_tuning", "false is not supported by llama4")
    for name, value in _TEMPERATURE:
        if settings.real(name, default=value) != value:
            raise settings.error(name, f"{settings.shown(name)} is not supported; llama4 computes with {value}")


def _chunks(model: ConvertedModel) -> None:
    """Writes which layers have attention chunks, and how long chunks are. Omits defaults (3 of 4 layers, 8192)."""
    settings, rotated = model.settings, _rotated(model)
    kinds = ["chunked_attention" if flag else "full_attention" for flag in rotated]
    if settings.has("layer_types") and settings.values["layer_types"] != kinds:
        raise settings.error("layer_types", "expected chunked_attention in exactly the layers with RoPE")
    if rotated != [(layer + 1) % _PERIOD != 0 for layer in range(model.layers)]:
        model.key("attention.sliding_window_pattern", np.array(rotated, np.bool_))
    chunk = settings.count("attention_chunk_size", default=_CHUNK, maximum=MAX_CONTEXT)
    if chunk != _CHUNK:
        model.key("attention.sliding_window", chunk)


def _rotated(model: ConvertedModel) -> list[bool]:
    """Returns, for each layer, True if the layer has RoPE."""
    settings = model.settings
    listed = settings.values.get("no_rope_layers")
    if not listed:
        interval = settings.count("no_rope_layer_interval", default=_PERIOD, maximum=MAX_LAYERS)
        return [(layer + 1) % interval != 0 for layer in range(model.layers)]
    if not isinstance(listed, list) or len(listed) != model.layers or not all(flag in (0, 1) for flag in listed):
        raise settings.error("no_rope_layers", f"expected {model.layers} numbers, 0 or 1 for each layer")
    return [flag == 1 for flag in listed]


def _experts(model: ConvertedModel, layer: int, count: int, width: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.feed_forward"
    model.copy(f"{place}.ffn_gate_inp", f"{source}.router", count, model.width)
    experts.column_matrices(model, place, f"{source}.experts", count, width)
    decoder.feed_forward(model, layer, width, source="feed_forward.shared_expert", suffix="_shexp")
