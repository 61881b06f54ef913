"""Writes projectors of random weights in the shapes of public vision models. The files also load in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from shape import random_matrix

from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of an image encoder and its projector. Widths are in channels. `image_size` and `patch_size` are sides in
    pixels. The projector makes one row of `merge` x `merge` patches. An image of 1024 x 768 pixels has `tiles` tiles of
    size `tile` (height, width). Layers in `kept` have their own projector (deepstack)."""

    projector: str
    quant_type: QuantType  # Quant type of published files.
    width: int
    layers: int
    ffn: int
    heads: int
    text_width: int
    image_size: int
    patch_size: int
    merge: int
    tile: tuple[int, int]
    tiles: int = 1
    kept: tuple[int, ...] = ()


VISION_SHAPES: Mapping[str, VisionShape] = {
    "smolvlm-500m": VisionShape("idefics3", QuantType.Q8_0, 768, 12, 3072, 12, 960, 512, 16, 4, (512, 512), tiles=13),
    "gemma-3-4b": VisionShape("gemma3", QuantType.F16, 1152, 27, 4304, 16, 2560, 896, 14, 4, (896, 896)),
    "qwen3-vl-4b": VisionShape(
        "qwen3vl_merger", QuantType.F16, 1024, 24, 4096, 16, 2560, 768, 16, 2, (768, 1024), kept=(5, 11, 17)
    ),
}


def write_vision_shape(path: Path, shape: VisionShape, quant_type: QuantType, layers: int, seed: int = 1) -> None:
    """Writes a projector with the first `layers` layers of the shape and random matrices of type `quant_type`."""
    generator = np.random.default_rng(seed)
    write_gguf(path, _metadata(shape, quant_type, layers), _Tensors(shape, quant_type, generator).all(layers))


def _metadata(shape: VisionShape, quant_type: QuantType, layers: int) -> dict[str, WritableValue]:
    half = np.full(3, 0.5, np.float32)
    numbers: dict[str, WritableValue] = {
        "has_vision_encoder": True,
        "projector_type": shape.projector,
        "use_gelu": True,
        "vision.image_size": shape.image_size,
        "vision.patch_size": shape.patch_size,
        "vision.embedding_length": shape.width,
        "vision.feed_forward_length": shape.ffn,
        "vision.projection_dim": shape.text_width,
        "vision.block_count": layers,
        "vision.attention.head_count": shape.heads,
        "vision.attention.layer_norm_epsilon": 1e-6,
        "vision.image_mean": half,
        "vision.image_std": half,
    }
    match shape.projector:
        case "idefics3":
            numbers |= {"vision.projector.scale_factor": shape.merge, "vision.preproc_image_size": 4 * shape.image_size}
        case "qwen3vl_merger":
            kept = np.isin(np.arange(layers), shape.kept)
            numbers |= {"vision.spatial_merge_size": shape.merge, "vision.is_deepstack_layers": kept}
    return {
        "general.architecture": "clip",
        "general.name": f"random {shape.projector} {quant_type.name}",
        **{f"clip.{key}": value for key, value in numbers.items()},
    }


@dataclass(frozen=True, slots=True)
class _Tensors:
    shape: VisionShape
    quant_type: QuantType
    generator: np.random.Generator

    def all(self, layers: int) -> Iterator[TensorSource]:
        shape, size = self.shape, (self.shape.width, 3, self.shape.patch_size, self.shape.patch_size)
        yield self._random("v.patch_embd.weight", QuantType.F32, size)
        if shape.projector == "qwen3vl_merger":
            yield self._random("v.patch_embd.weight.1", QuantType.F32, size)
        yield self._vector("v.patch_embd.bias", shape.width, 0.0)
        positions = (shape.image_size // shape.patch_size) ** 2
        yield self._random("v.position_embd.weight", QuantType.F32, (positions, shape.width))
        for layer in range(layers):
            yield from self._layer(layer)
        yield from self._norm("v.post_ln", shape.width)
        yield from self._projector(layers)

    def _layer(self, layer: int) -> Iterator[TensorSource]:
        shape, prefix = self.shape, f"v.blk.{layer}"
        fused = shape.projector == "qwen3vl_merger"
        attention = {"attn_qkv": 3} if fused else dict.fromkeys(("attn_q", "attn_k", "attn_v"), 1)
        for norm in ("ln1", "ln2"):
            yield from self._norm(f"{prefix}.{norm}", shape.width)
        for part, count in {**attention, "attn_out": 1}.items():
            yield from self._linear(f"{prefix}.{part}", count * shape.width, shape.width)
        yield from self._linear(f"{prefix}.ffn_up", shape.ffn, shape.width)
        yield from self._linear(f"{prefix}.ffn_down", shape.width, shape.ffn)

    def _projector(self, layers: int) -> Iterator[TensorSource]:
        shape, merged = self.shape, self.shape.width * self.shape.merge**2
        match shape.projector:
            case "idefics3":
                yield self._matrix("mm.model.fc.weight", shape.text_width, merged)
            case "gemma3":
                yield self._vector("mm.soft_emb_norm.weight", shape.width, 1.0)
                size = (shape.width, shape.text_width)
                yield self._random("mm.input_projection.weight", QuantType.F16, size)
            case "qwen3vl_merger":
                yield from self._perceptron("mm.0", "mm.2", merged)
                for layer in (each for each in shape.kept if each < layers):
                    yield from self._norm(f"v.deepstack.{layer}.norm", merged)
                    yield from self._perceptron(f"v.deepstack.{layer}.fc1", f"v.deepstack.{layer}.fc2", merged)

    def _perceptron(self, first: str, second: str, width: int) -> Iterator[TensorSource]:
        yield from self._linear(first, width, width)
        yield from self._linear(second, self.shape.text_width, width)

    def _linear(self, name: str, rows: int, columns: int) -> Iterator[TensorSource]:
        yield self._matrix(f"{name}.weight", rows, columns)
        yield self._vector(f"{name}.bias", rows, 0.0)

    def _norm(self, name: str, width: int) -> Iterator[TensorSource]:
        yield self._vector(f"{name}.weight", width, 1.0)
        yield self._vector(f"{name}.bias", width, 0.0)

    def _vector(self, name: str, width: int, value: float) -> TensorSource:
        return TensorSource(name, QuantType.F32, (width,), lambda: np.full(width, value, np.float32).data)

    def _matrix(self, name: str, rows: int, columns: int) -> TensorSource:
        whole = columns % self.quant_type.info.block_size == 0
        return self._random(name, self.quant_type if whole else QuantType.F16, (rows, columns))

    def _random(self, name: str, quant_type: QuantType, size: tuple[int, ...]) -> TensorSource:
        return TensorSource(name, quant_type, size, partial(random_matrix, self.generator, quant_type, size))
