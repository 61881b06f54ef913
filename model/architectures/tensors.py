"""Checks that the model file has the tensors that programs read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.hyperparameters import MAX_LAYERS, RopeParameters
from llamaclust.model.model_keys import NEXTN_KEY, SHARED_KV_KEY, ModelKeys
from llamaclust.model.program import Buffer, MatMul, Slice
from llamaclust.model.quant_types import QuantType

FACTORS, _SHORT_FACTORS, LONG_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
FACTOR_TENSORS = (FACTORS, _SHORT_FACTORS, LONG_FACTORS)
"""Names of the tensors with RoPE factors, whose values become part of the program."""


class CheckedTensors:
    """Checks tensors by name. Methods raise ModelFileError if a tensor is missing or has another shape or type."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model

    def has(self, name: str) -> bool:
        return name in self.model.tensors

    def require(self, layer: int, *names: str) -> None:
        for name in names:
            self.model.tensor(f"blk.{layer}.{name}")

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        found = self.model.tensor(name).shape
        if found != shape:
            raise self.error(name, f"expected shape {list(reversed(shape))}, found {list(reversed(found))}")
        return name

    def vector(self, name: str, width: int) -> str:
        return self.floats(name, (width,))

    def floats(self, name: str, shape: tuple[int, ...], types: Sequence[QuantType] = (QuantType.F32,)) -> str:
        self.weight(name, shape)
        found = self.model.tensor(name).quant_type
        if found not in types:
            known = ", ".join(kind.name for kind in types)
            raise self.error(name, f"expected type {known}, found {found.name}")
        return name

    def product(self, name: str, x: Buffer, out: Buffer) -> MatMul:
        weight = self.weight(f"{name}.weight", (out.width, x.width))
        return MatMul(x, out, weight, self.optional_vector(f"{name}.bias", out.width))

    def product_parts(self, name: str, x: Buffer, parts: Sequence[Buffer]) -> Iterator[MatMul | Slice]:
        whole = Buffer("+".join(part.name for part in parts), sum(part.width for part in parts))
        yield self.product(name, x, whole)
        start = 0
        for part in parts:
            yield Slice(whole, part, start)
            start += part.width

    def optional_vector(self, name: str, width: int) -> str | None:
        return self.vector(name, width) if self.has(name) else None

    def rope_factors(self, rope: RopeParameters, context_tokens: int) -> tuple[float, ...] | None:
        """Returns the divisors of RoPE frequencies, or None if the file has none. If the file has long and short
        divisors, `context_tokens` decides which are returned."""
        by_context = LONG_FACTORS if context_tokens > rope.original_context_length else _SHORT_FACTORS
        name = FACTORS if self.has(FACTORS) else by_context
        if not self.has(name):
            return None
        self.vector(name, rope.dimension_count // 2)
        values = np.frombuffer(self.model.tensor(name).read(), "<f4")
        if not (np.isfinite(values) & (values > 0)).all():
            raise self.error(name, "the tensor has factors that are not positive numbers")
        return tuple(values.tolist())

    def error(self, tensor: str, what: str, advice: str = "use another GGUF file of this model") -> ModelFileError:
        return ModelFileError(f"{self.model.path}: tensor {tensor}: {what}; {advice}")


def nextn_tensors(model: ModelFile) -> Iterator[str]:
    """Yields the tensor names of heads for multi-token prediction (MTP). These heads are the model's last layers."""
    keys = ModelKeys(model)
    count = keys.count(NEXTN_KEY, 0, minimum=0, maximum=MAX_LAYERS)
    layers = keys.count("block_count", maximum=MAX_LAYERS)
    prefixes = tuple(f"blk.{layer}." for layer in range(layers - count, layers))
    return (name for name in model.tensors if name.startswith(prefixes)) if prefixes else iter(())


def idle_kv_tensors(model: ModelFile) -> Iterator[str]:
    """Yields the names of key and value weights that no step reads, because their layers use other layers' keys."""
    keys = ModelKeys(model)
    layers = keys.count("block_count", maximum=MAX_LAYERS)
    shared = keys.count(SHARED_KV_KEY, 0, minimum=0, maximum=layers)
    names = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    return (f"blk.{layer}.{name}" for layer in range(layers - shared, layers) for name in names)
