"""Reads a model's hyperparameters from its metadata, and checks their ranges and their consistency."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.values import shown
from llamaclust.model.model_keys import LATENT_KEYS, NEXTN_KEY, ModelKeys

_MAX_USED_EXPERTS = 256  # Kernels have room for this number of experts per token.
_MAX_WIDTH = 1 << 20
_MAX_CONTEXT = 1 << 30
_LEAST_STRETCH = 0.01

MAX_LAYERS = 1 << 10
PROJECTOR_ARCHITECTURE = "clip"


class RopeScaling(StrEnum):
    NONE = "none"
    LINEAR = "linear"
    LONGROPE = "longrope"  # Linear scaling, and a factor from a tensor for each channel pair.
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """RoPE of the first `dimension_count` channels of a head. Only YaRN uses `extrapolation_factor`, `beta_fast`,
    `beta_slow`, `log_multiplier` and `truncated`."""

    dimension_count: int
    frequency_base: float
    scaling: RopeScaling
    factor: float
    original_context_length: int
    attention_factor: float
    extrapolation_factor: float
    beta_fast: float
    beta_slow: float
    log_multiplier: float = 0.0
    truncated: bool = True


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Widths (in channels) and counts of a model. Tuples have one number for each layer, which is 0 for layers without
    attention (KV heads) or without a feed-forward network. `expert_count` is 0 without experts."""

    architecture: str
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_lengths: tuple[int, ...]
    head_count: int
    head_counts_kv: tuple[int, ...]
    key_length: int
    rms_epsilon: float | None  # None if the norms subtract the mean. Another key has their epsilon.
    rope: RopeParameters
    expert_count: int
    expert_used_count: int
    expert_feed_forward_length: int
    vocabulary_size: int
    sliding_window: int | None  # Window size in tokens, with the token itself. None without a sliding window.

    @property
    def query_width(self) -> int:
        return self.head_count * self.key_length

    @property
    def head_count_kv(self) -> int:
        return max(self.head_counts_kv)

    @property
    def feed_forward_length(self) -> int:
        return max(self.feed_forward_lengths)


def read_hyperparameters(model: ModelFile) -> Hyperparameters:
    return hyperparameters_of(ModelKeys(model))


def hyperparameters_of(keys: ModelKeys) -> Hyperparameters:
    embedding_length = keys.count("embedding_length", maximum=_MAX_WIDTH)
    head_count = keys.count("attention.head_count", maximum=1 << 14)
    block_count = read_block_count(keys)
    feed_forward_lengths = _read_feed_forward_lengths(keys, block_count)
    expert_count = keys.count("expert_count", 0, minimum=0, maximum=1 << 10)
    context_length = keys.count("context_length", maximum=_MAX_CONTEXT)
    key_length = _read_key_length(keys, embedding_length, head_count)
    return Hyperparameters(
        architecture=keys.architecture,
        block_count=block_count,
        context_length=context_length,
        embedding_length=embedding_length,
        feed_forward_lengths=feed_forward_lengths,
        head_count=head_count,
        head_counts_kv=_read_kv_heads(keys, block_count, head_count),
        key_length=key_length,
        rms_epsilon=_read_rms_epsilon(keys),
        rope=_read_rope(keys, key_length, context_length),
        expert_count=expert_count,
        expert_used_count=_read_used_experts(keys, expert_count),
        expert_feed_forward_length=keys.count(
            "expert_feed_forward_length", max(feed_forward_lengths), maximum=_MAX_WIDTH
        ),
        vocabulary_size=_read_vocabulary_size(keys),
        sliding_window=keys.count("attention.sliding_window", 0, minimum=0, maximum=_MAX_CONTEXT) or None,
    )


def read_block_count(keys: ModelKeys) -> int:
    count = keys.count("block_count", maximum=MAX_LAYERS)
    return count - keys.count(NEXTN_KEY, 0, minimum=0, maximum=count - 1)


def _read_feed_forward_lengths(keys: ModelKeys, layers: int) -> tuple[int, ...]:
    key = "feed_forward_length"
    lengths = keys.counts(key, layers, minimum=0, maximum=_MAX_WIDTH)
    if not any(lengths):
        raise keys.error(key, f"expected 1 to {_MAX_WIDTH}, found 0")
    return lengths


def _read_kv_heads(keys: ModelKeys, layers: int, heads: int) -> tuple[int, ...]:
    key = "attention.head_count_kv"
    counts = keys.counts(key, layers, heads, minimum=0, maximum=heads)
    if not any(counts):
        raise keys.error(key, "the count is 0 in all layers")
    for count in filter(None, counts):
        if heads % count:
            raise keys.error(key, f"{count} KV heads do not divide {heads} heads")
    return counts


def _read_key_length(keys: ModelKeys, embedding_length: int, head_count: int) -> int:
    key_length = keys.count("attention.key_length", embedding_length // head_count, maximum=1 << 12)
    if not keys.has("attention.key_length") and embedding_length % head_count:
        raise keys.error("attention.head_count", f"{head_count} heads do not divide a width of {embedding_length}")
    value_length = keys.count("attention.value_length", key_length, maximum=1 << 12)
    if value_length != key_length and not all(map(keys.has, LATENT_KEYS)):
        if keys.has("attention.kv_lora_rank"):
            raise keys.error(LATENT_KEYS[0], "missing, as in files from before May 2025: convert the model again")
        raise keys.error("attention.value_length", f"expected {key_length} as for keys, found {value_length}")
    return key_length


def _read_rms_epsilon(keys: ModelKeys) -> float | None:
    key = "attention.layer_norm_rms_epsilon"
    if not keys.has(key) and keys.has("attention.layer_norm_epsilon"):
        return None
    return keys.real(key, minimum=1e-13, maximum=0.1)


def _read_used_experts(keys: ModelKeys, expert_count: int) -> int:
    if expert_count == 0:
        return keys.count("expert_used_count", 0, minimum=0, maximum=0)
    return keys.count("expert_used_count", maximum=min(expert_count, _MAX_USED_EXPERTS))


def _read_vocabulary_size(keys: ModelKeys) -> int:
    model = keys.model
    if "tokenizer.ggml.tokens" not in model.metadata:
        return keys.count("vocab_size", maximum=1 << 24)
    words = len(model.metadata_strings("tokenizer.ggml.tokens"))
    if words == 0:
        raise model.error("tokenizer.ggml.tokens", "empty")
    return words


def _read_rope(keys: ModelKeys, key_length: int, context_length: int) -> RopeParameters:
    dimension_count = keys.count("rope.dimension_count", key_length, maximum=key_length)
    if dimension_count % 2:
        raise keys.error("rope.dimension_count", f"expected an even number, found {dimension_count}")
    factor = _read_factor(keys)
    scaling = _read_scaling(keys, factor)
    return RopeParameters(
        dimension_count=dimension_count,
        frequency_base=keys.real("rope.freq_base", 10000.0, minimum=1.0, maximum=1e12),
        scaling=scaling,
        factor=1.0 if scaling is RopeScaling.NONE else factor,
        original_context_length=keys.count(
            "rope.scaling.original_context_length", context_length, maximum=_MAX_CONTEXT
        ),
        attention_factor=keys.real("rope.scaling.attn_factor", 1.0, minimum=1e-3, maximum=1e3),
        extrapolation_factor=keys.real("rope.scaling.yarn_ext_factor", 1.0, minimum=0.0, maximum=1.0),
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0, minimum=1e-3, maximum=1e6),
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0, minimum=1e-3, maximum=1e6),
        truncated=keys.flag("rope.scaling.yarn_truncate", True),
    )


def _read_factor(keys: ModelKeys) -> float:
    key = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
    factor = keys.real(key, 1.0, minimum=0.0, maximum=1e6) or 1.0
    if factor < _LEAST_STRETCH:
        raise keys.error(key, f"expected 0 or at least {_LEAST_STRETCH}, found {factor:g}")
    return factor


def _read_scaling(keys: ModelKeys, factor: float) -> RopeScaling:
    name = keys.text("rope.scaling.type", "none" if factor == 1.0 else "linear")
    if name not in set(RopeScaling):
        raise keys.error("rope.scaling.type", f"{shown(name)} is not supported")
    return RopeScaling(name)
