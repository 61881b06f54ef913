"""Converts the rotary embedding and its scaling from a configuration to GGUF keys."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.lazy import constant
from llamaclust.tools.convert.settings import MAX_CONTEXT

_LEAST_TURNS: Final = 1e-3
_HUNYUAN_ALPHA: Final = 1000
_HUNYUAN_CONTEXT: Final = 1 << 18
"""The context length that the authors report for models with alpha 1000. Some configurations state an eighth of it."""
_LLAMA3: Final = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotation(
    model: ConvertedModel,
    dimensions: int,
    *,
    base: float | None = None,
    says_dimensions: bool = True,
    log_multiplier: bool = False,
) -> None:
    """Writes RoPE's metadata and tensors of frequency factors. RoPE rotates `dimensions` channels of each head. `base`
    is used if the configuration states no base. Raises ModelFileError for an unknown kind of scaling."""
    rope = _parameters(model.settings)
    theta = _base(rope, base or 10000.0)
    model.key("rope.freq_base", theta)
    if says_dimensions:
        model.key("rope.dimension_count", dimensions)
    kind = rope.text("rope_type", "type", default="default").lower()
    if kind == "linear":
        model.key("rope.scaling.type", "linear")
        model.key("rope.scaling.factor", rope.real("factor", minimum=1e-3, maximum=1e6))
    elif kind == "yarn":
        _yarn(model, rope, log_multiplier)
    elif kind == "llama3":
        _llama3(model, rope, theta, dimensions)
    elif kind in ("su", "longrope"):
        _longrope(model, rope, dimensions)
    elif kind == "dynamic":
        _dynamic(model, rope)
    elif kind != "default":
        raise rope.error("rope_type", f"{shown(kind)} is not known; known: linear, dynamic, yarn, llama3, longrope")


def latent_rotation(model: ConvertedModel, dimensions: int) -> None:
    """Writes RoPE's metadata for latent attention. Raises ModelFileError for scaling that GGUF cannot express."""
    rope = _parameters(model.settings)
    model.key("rope.freq_base", _base(rope, 10000.0))
    model.key("rope.dimension_count", dimensions)
    kind = rope.text("rope_type", "type", default="default").lower()
    if kind == "default":
        return
    if kind != "yarn":
        raise rope.error("rope_type", f"{shown(kind)} is not supported; {model.architecture} supports yarn")
    factor, share = _yarn_keys(model, rope), rope.real("mscale_all_dim", default=0.0, maximum=1e3)
    if not share or rope.real("mscale", default=0.0, maximum=1e3) != share:
        both = f"{rope.shown('mscale_all_dim')}, and mscale is {rope.shown('mscale')}"
        raise rope.error("mscale_all_dim", f"{both}; {model.architecture} needs two equal numbers above 0")
    if rope.real("attention_factor", "attn_factor", default=1.0) != 1:
        raise rope.error("attention_factor", f"expected 1, since {model.architecture} computes with 1")
    model.key("rope.scaling.yarn_log_multiplier", share / 10)
    if model.architecture == "mistral4" and share != 1:
        model.key("rope.scaling.attn_factor", _growth(factor, share) / _growth(factor))


def alpha_rotation(model: ConvertedModel, dimensions: int) -> bool:
    """Writes the metadata of dynamic RoPE. If RoPE is not dynamic or `alpha` is 0, writes nothing and returns False."""
    rope = _parameters(model.settings)
    alpha = rope.real("alpha", default=0.0, maximum=1e6)
    if rope.text("rope_type", "type", default="default").lower() != "dynamic" or not alpha:
        return False
    if alpha < 1:
        raise rope.error("alpha", f"expected a number of 1 or more, found {alpha:g}")
    if dimensions < 4:
        raise rope.error("alpha", f"{alpha:g} with heads of {dimensions} channels is not supported")
    model.key("rope.freq_base", _base(rope, 10000.0) * alpha ** (dimensions / (dimensions - 2)))
    model.key("rope.dimension_count", dimensions)
    if alpha >= _HUNYUAN_ALPHA:
        model.key(
            "context_length",
            max(_HUNYUAN_CONTEXT, model.settings.count("max_position_embeddings", maximum=MAX_CONTEXT)),
        )
    return True


def rotating_channels(model: ConvertedModel, default_share: float = 1.0) -> int:
    rope = _parameters(model.settings)
    share = rope.real("partial_rotary_factor", default=default_share, maximum=1.0)
    channels = int(share * model.head_width)
    if channels < 2 or channels % 2:
        what = f"expected an even number of 2 or more channels, found {channels} ({share:g} of {model.head_width})"
        raise rope.error("partial_rotary_factor", what)
    return channels


def sections(settings: Settings, pairs: int) -> list[int]:
    """Returns M-RoPE's four sections: the number of channel pairs that rotate with each coordinate of a position."""
    listed = _parameters(settings).values.get("mrope_section")
    if listed is None:
        return [(pairs + 2 - number) // 3 for number in range(3)] + [0]
    if not isinstance(listed, list) or not all(type(count) is int and 0 <= count <= pairs for count in listed):
        raise settings.error("mrope_section", f"expected whole numbers from 0 to {pairs}")
    if len(listed) not in (3, 4):
        raise settings.error("mrope_section", f"expected 3 or 4 numbers, found {len(listed)}")
    if sum(listed) > pairs:
        raise settings.error("mrope_section", f"the sum of {listed} exceeds {pairs} rotated pairs")
    return [*listed, 0][:4]


def position_scale(model: ConvertedModel) -> int:
    """Writes the scale of queries, which grows with the position. Returns how many consecutive positions share a
    scale, or 0 if the configuration has no such scale."""
    rope = _parameters(model.settings)
    growth = rope.real("llama_4_scaling_beta", default=0.0, maximum=1e3)
    if not growth:
        return 0
    original = rope.count("original_max_position_embeddings", maximum=MAX_CONTEXT)
    model.key("attention.temperature_scale", growth)
    model.key("rope.scaling.original_context_length", original)
    return original


def local_base(settings: Settings, default: float = 10000.0) -> float:
    rope = settings.inner("rope_parameters", "rope_scaling").inner("sliding_attention")
    if rope.text("rope_type", "type", default="default") != "default":
        raise rope.error("rope_type", "RoPE scaling in layers with a sliding window is not supported")
    return _base(rope, settings.real("rope_local_base_freq", default=default, minimum=1.0))


def _parameters(settings: Settings) -> Settings:
    """Returns all settings of RoPE, from inside and outside of `rope_scaling`."""
    inner = settings.inner("rope_parameters", "rope_scaling")
    inner = inner.inner("full_attention") if inner.has("full_attention") else inner
    outer = ("rope_theta", "rotary_emb_base", "original_max_position_embeddings", "partial_rotary_factor")
    values = {name: settings.values[name] for name in outer if settings.has(name)}
    return Settings(values | {name: value for name, value in inner.values.items() if value is not None}, inner.origin)


def _base(rope: Settings, default: float) -> float:
    return rope.real("rope_theta", "rotary_emb_base", default=default, minimum=1.0)


def _yarn(model: ConvertedModel, rope: Settings, log_multiplier: bool) -> None:
    factor = _yarn_keys(model, rope)
    wanted = rope.real("attention_factor", "attn_factor", default=_magnitude(rope, factor), minimum=1e-3, maximum=1e3)
    usual = _growth(factor)
    if log_multiplier and rope.has("mscale_all_dim"):
        divisor = rope.real("mscale_all_dim", maximum=1e3)
        model.key("rope.scaling.yarn_log_multiplier", divisor)
        usual /= _growth(factor, divisor)
    # A configuration states the attention factor, and GGUF its ratio to the usual factor.
    if wanted != usual:
        model.key("rope.scaling.attn_factor", wanted / usual)


def _yarn_keys(model: ConvertedModel, rope: Settings) -> float:
    factor = rope.real("factor", minimum=1e-3, maximum=1e6)
    model.key("rope.scaling.type", "yarn")
    model.key("rope.scaling.factor", factor)
    trained = model.settings.count("max_position_embeddings", default=0, minimum=0, maximum=MAX_CONTEXT)
    original = rope.count("original_max_position_embeddings", default=trained or None, maximum=MAX_CONTEXT)
    model.key("rope.scaling.original_context_length", original)
    if not rope.flag("truncate", default=True):
        model.key("rope.scaling.yarn_truncate", False)
    if _base(rope, 10000.0) <= 1:
        raise rope.error("rope_theta", f"expected more than 1 with yarn, found {rope.shown('rope_theta')}")
    for key, name, least in (
        ("yarn_ext_factor", "extrapolation_factor", 0.0),
        ("yarn_beta_fast", "beta_fast", _LEAST_TURNS),
        ("yarn_beta_slow", "beta_slow", _LEAST_TURNS),
    ):
        if rope.has(name):
            model.key(f"rope.scaling.{key}", rope.real(name, minimum=least, maximum=1e6))
    return factor


def _magnitude(rope: Settings, factor: float) -> float:
    if not (rope.has("mscale") and rope.has("mscale_all_dim")):
        return _growth(factor)
    up, down = (rope.real(name, maximum=1e3) for name in ("mscale", "mscale_all_dim"))
    return _growth(factor, up) / _growth(factor, down) if up and down else _growth(factor)


def _growth(factor: float, share: float = 1.0) -> float:
    return 1 + 0.1 * share * math.log(factor) if factor > 1 else 1.0


def _dynamic(model: ConvertedModel, rope: Settings) -> None:
    """Writes no metadata for dynamic scaling, but adds a note for the user."""
    if rope.has("alpha"):
        raise rope.error("alpha", f"{rope.shown('alpha')} is not supported by {model.architecture}")
    context = model.metadata[f"{model.architecture}.context_length"]
    model.notes.append(f"dynamic rope scaling begins after {context} tokens, the context length in the file")


def _llama3(model: ConvertedModel, rope: Settings, theta: float, dimensions: int) -> None:
    defaults = dict(zip(_LLAMA3, (8.0, 1.0, 4.0, 8192.0), strict=True))
    factor, low, high, original = (rope.real(name, default=defaults[name], minimum=1e-3) for name in _LLAMA3)
    if low > high:
        raise rope.error("low_freq_factor", f"expected at most the high_freq_factor of {high:g}, found {low:g}")
    frequencies = np.float32(1) / np.float32(theta) ** (np.arange(0, dimensions, 2, dtype=np.float32) / dimensions)
    factors = []
    for length in (2 * math.pi / frequencies).tolist():
        if length < original / high:
            factors.append(1.0)
        elif length >= original / low:
            factors.append(factor)
        else:
            share = (original / length - low) / (high - low)
            factors.append(1 / ((1 - share) / factor + share))
    model.put("rope_freqs.weight", constant(np.array(factors, np.float32), "rope factors"))


def _longrope(model: ConvertedModel, rope: Settings, dimensions: int) -> None:
    original = rope.count("original_max_position_embeddings", minimum=2, maximum=MAX_CONTEXT)
    context = model.settings.count("max_position_embeddings", default=original, maximum=MAX_CONTEXT)
    model.key("rope.scaling.type", "longrope")
    model.key("rope.scaling.original_context_length", original)
    scale = rope.real("factor", default=context / original, minimum=1e-3, maximum=1e6)
    magnitude = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    model.key("rope.scaling.attn_factor", rope.real("attention_factor", default=magnitude, maximum=1e3))
    for name in ("long", "short"):
        factors = np.array(rope.reals(f"{name}_factor", dimensions // 2), np.float32)
        model.put(f"rope_factors_{name}.weight", constant(factors, f"{name} rope factors"))
