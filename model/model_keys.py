"""Reads a model's metadata keys. `model/architectures` reads the keys of single architectures."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.values import shown

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
    """Reads metadata keys, given without the architecture's prefix, and records which keys were read."""

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

    def integers(self, key: str) -> tuple[int, ...]:
        value: Any = self.model.metadata.get(self._recorded(key))
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.error(key, f"expected an array of whole numbers, found {shown(str(value))}")
        return tuple(map(int, value))

    def reals(self, key: str, layers: int) -> tuple[float, ...]:
        value: Any = self.model.metadata.get(self._recorded(key))
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise self.error(key, f"expected an array of numbers for {layers} layers, found {shown(str(value))}")
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
            raise self.error(key, f"expected true or false, found {shown(str(value))}")
        return bool(value)

    def flags(self, key: str, layers: int) -> list[bool] | None:
        self._read.add(key)
        return self._layer_flags(key, layers) if self.has(key) else None

    def _layer_flags(self, key: str, layers: int) -> list[bool]:
        value: Any = self.model.metadata[self._full(key)]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biu":
            raise self.error(key, f"expected an array of true or false for {layers} layers, found {shown(str(value))}")
        if len(value) < layers:
            raise self.error(key, f"expected {layers} numbers, one for each layer, found {len(value)}")
        return [bool(flag) for flag in value[:layers]]

    def refuse_unread(self) -> None:
        """Raises ModelFileError if a key that was not read has a value that would change the arithmetic."""
        for key in _NEUTRAL_VALUES.keys() - self._read:
            if not self.has(key):
                continue
            value: Any = self.model.metadata[self._full(key)]
            numbers = np.asarray(value)
            if numbers.dtype.kind not in "iuf" or not np.isin(numbers, _NEUTRAL_VALUES[key]).all():
                raise self.error(key, f"{shown(str(value))} is not supported")

    def windowed_layers(self, layers: int, default_period: int, *, full_first: bool = False) -> list[bool]:
        """Returns, for each layer, True if its attention has the sliding window. If the file does not say, all layers
        have it except the last of each period (the first if `full_first`). With a period of 0, all layers have it."""
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
