"""Reads a model's metadata keys, and its hyperparameters with checks of ranges and consistency. `model/architectures`
reads the keys of single architectures."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.values import described, shown
from llamaclust.model.hyperparameters import MAX_LAYERS, Hyperparameters, RopeParameters, RopeScaling

_MAX_USED_EXPERTS = 256  # Kernels have room for this number of experts per token.
_MAX_WIDTH = 1 << 20
_MAX_CONTEXT = 1 << 30
_LEAST_STRETCH = 0.01

_NEUTRAL_VALUES = {
    "attention.clamp_kqv": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # 1 means softmax.
    "expert_group_count": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "moe_latent_size": (0,),
    "num_loops": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
}
"""Keys that change the arithmetic of some architectures, with the values that change nothing. Files with another value
are refused if the architecture does not read the key."""

LATENT_KEYS = ("attention.key_length_mla", "attention.value_length_mla")
"""Keys for the widths of a head's query and value in latent attention. The usual keys have the widths in KV memory."""

SHARED_KV_KEY = "attention.shared_kv_layers"
"""The metadata key for the number of last layers that read the keys and values of earlier layers."""
NEXTN_KEY = "nextn_predict_layers"
"""The metadata key for the number of last layers that are heads for multi-token prediction (MTP)."""


def read_architecture(model: ModelFile) -> str:
    return model.metadata_str("general.architecture")


class ModelKeys:
    """Reads metadata keys, and records which keys were read. Methods take keys without the architecture's prefix."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self.architecture = read_architecture(model)
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return self._full(key) in self.model.metadata

    def error(self, key: str, what: str) -> ModelFileError:
        return self.model.error(self._full(key), what)

    def count(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int) -> int:
        """Returns a whole number from metadata. Also accepts an array with the same number for each layer."""
        value: Any = self.model.metadata.get(self._recorded(key))
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if (value != value[0]).any():
                raise self.error(key, "different values per layer are not supported")
            default = int(value[0])
            if not minimum <= default <= maximum:
                raise self.error(key, f"expected {minimum} to {maximum}, found {default}")
            return default
        return self.model.metadata_int(self._recorded(key), default, minimum=minimum, maximum=maximum)

    def counts(
        self, key: str, layers: int, default: int | None = None, *, minimum: int = 1, maximum: int
    ) -> tuple[int, ...]:
        value: Any = self.model.metadata.get(self._recorded(key))
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            return (self.count(key, default, minimum=minimum, maximum=maximum),) * layers
        if len(value) < layers:
            raise self.error(key, f"expected {layers} numbers, one for each layer, found {len(value)}")
        for number in map(int, value[:layers]):
            if not minimum <= number <= maximum:
                raise self.error(key, f"expected {minimum} to {maximum}, found {number}")
        return tuple(map(int, value[:layers]))

    def integers(self, key: str, most: int) -> tuple[int, ...]:
        value: Any = self.model.metadata.get(self._recorded(key))
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.error(key, f"expected an array of whole numbers, found {described(value)}")
        if len(value) > most:
            raise self.error(key, f"expected at most {most} numbers, found {len(value)}")
        return tuple(map(int, value))

    def reals(self, key: str, layers: int) -> tuple[float, ...]:
        value: Any = self.model.metadata.get(self._recorded(key))
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise self.error(key, f"expected an array of numbers for {layers} layers, found {described(value)}")
        if len(value) < layers:
            raise self.error(key, f"expected {layers} numbers, one for each layer, found {len(value)}")
        return tuple(map(float, value[:layers]))

    def real(self, key: str, default: float | None = None, *, minimum: float, maximum: float) -> float:
        return self.model.metadata_float(self._recorded(key), default, minimum=minimum, maximum=maximum)

    def text(self, key: str, default: str) -> str:
        return self.model.metadata_str(self._recorded(key), default)

    def flag(self, key: str, default: bool) -> bool:
        value: Any = self.model.metadata.get(self._recorded(key), default)
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"expected true or false, found {described(value)}")
        return bool(value)

    def flags(self, key: str, layers: int) -> list[bool] | None:
        self._read.add(key)
        return self._layer_flags(key, layers) if self.has(key) else None

    def _layer_flags(self, key: str, layers: int) -> list[bool]:
        value: Any = self.model.metadata[self._full(key)]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biu":
            raise self.error(key, f"expected an array of true or false for {layers} layers, found {described(value)}")
        if len(value) < layers:
            raise self.error(key, f"expected {layers} numbers, one for each layer, found {len(value)}")
        return [bool(flag) for flag in value[:layers]]

    def refuse_unread(self) -> None:
        """Raises ModelFileError if a key that was not read has a value that would change the arithmetic."""
        for key in _NEUTRAL_VALUES.keys() - self._read:
            if not self.has(key):
                continue
            value: Any = self.model.metadata[self._full(key)]
            numbers = np.asarray(value if isinstance(value, int | float | np.ndarray) else None)
            if numbers.dtype.kind not in "iuf" or not np.isin(numbers, _NEUTRAL_VALUES[key]).all():
                raise self.error(key, f"{described(value)} is not supported")

    def windowed_layers(self, layers: int, default_period: int, *, full_first: bool = False) -> list[bool]:
        """Returns, for each layer, True if its attention has the sliding window. Unless the file lists the layers, all
        layers have it except the last of each period (the first if `full_first`). If the period is 0, all have it."""
        key = "attention.sliding_window_pattern"
        if isinstance(self.model.metadata.get(self._recorded(key)), np.ndarray):
            return self._layer_flags(key, layers)
        period = self.model.metadata_int(self._recorded(key), default_period, minimum=0, maximum=1 << 10)
        full = 0 if full_first else period - 1
        return [period == 0 or layer % period != full for layer in range(layers)]

    def _recorded(self, key: str) -> str:
        self._read.add(key)
        return self._full(key)

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"


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
        raise keys.error("attention.value_length", f"expected {key_length}, the length of keys, found {value_length}")
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
