"""Writes random weights in the shape of a public model, for speed measurements. The file also loads in llama.cpp.

    python benchmarks/public_shape.py qwen3-30b-a3b:q4_k_m /tmp/shape.gguf --layers 8

The shapes are those of `llamaclust plan --assume` and of the catalog. With fewer layers, a model needs less memory, and
the speed of a layer stays the same. All layers have the same bytes, so that files are written fast."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from shape import random_matrix, tokenizer

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume.assumed_model import shape_model
from llamaclust.tools.assume.public_shapes import public_shapes
from llamaclust.tools.assume.shapes import SHAPES
from llamaclust.tools.quantize.mixes import ALIASES, MIXES

SIZES = ("layers", "experts", "vocabulary")


def public_shape(spec: str, sizes: Mapping[str, int]) -> ModelFile:
    """Returns the model file of NAME[:MIX] with these `sizes`, without tensor data. Raises UsageError if the name or
    mix is unknown or if there are too few layers."""
    name, _, mix = spec.lower().partition(":")
    known = {**public_shapes(), **SHAPES}
    if name not in known:
        raise UsageError(f"{name!r} is not a known shape; choose from {', '.join(known)}")
    shape = replace(known[name], **sizes)  # type: ignore[arg-type]
    if shape.layers <= shape.leading_layers:
        raise UsageError(
            f"{shape.layers} layers are too few: the first {shape.leading_layers} of {name} have no experts"
        )
    chosen = ALIASES.get(mix.upper(), mix.upper())
    if chosen and chosen not in MIXES:
        raise UsageError(f"{mix!r} is not a known quantization; choose from {', '.join(MIXES).lower()}")
    return shape_model(name, shape, chosen).file


def write_public_shape(path: Path, file: ModelFile, seed: int = 1) -> None:
    vocabulary = file.metadata[f"{file.metadata['general.architecture']}.vocab_size"]
    assert isinstance(vocabulary, int)
    metadata: dict[str, WritableValue] = {
        **file.metadata,
        **tokenizer(vocabulary),
        "general.quantization_version": 2,
    }
    write_gguf(path, metadata, sources_of(file, seed))


def sources_of(file: ModelFile, seed: int) -> Iterator[TensorSource]:
    generator, made = np.random.default_rng(seed), dict[tuple[str, QuantType], memoryview]()

    def content(tensor: Tensor) -> memoryview:
        place = tensor.name.split(".", 2)[-1] if tensor.name.startswith("blk.") else tensor.name
        if (place, tensor.quant_type) not in made:
            made[place, tensor.quant_type] = _values(generator, tensor)
        return made[place, tensor.quant_type]

    for tensor in file.tensors.values():
        yield TensorSource(tensor.name, tensor.quant_type, tensor.shape, partial(content, tensor))


def _values(generator: np.random.Generator, tensor: Tensor) -> memoryview:
    """Returns a tensor's bytes: 1 for norms, 0 for other vectors, and random values for matrices. Random routers choose
    among all experts."""
    if tensor.name.endswith("ffn_gate_inp.weight"):
        router = generator.standard_normal(tensor.shape, np.float32) / np.float32(tensor.shape[-1] ** 0.5)
        return router.data
    if tensor.quant_type is QuantType.F32 and (len(tensor.shape) == 1 or tensor.name.endswith(".bias")):
        return np.full(tensor.shape, float("norm" in tensor.name), np.float32).data
    return random_matrix(generator, tensor.quant_type, tensor.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random weights in the shape of a public model.")
    parser.add_argument("shape", help=f"NAME[:QUANTIZATION], a model of the catalog or one of {', '.join(SHAPES)}")
    parser.add_argument("path", type=Path)
    for size in ("--layers", "--experts", "--vocabulary"):
        parser.add_argument(size, type=int, help="overrides this size of the shape")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started = time.perf_counter()
    sizes = {size: getattr(arguments, size) for size in SIZES if getattr(arguments, size) is not None}
    write_public_shape(arguments.path, public_shape(arguments.shape, sizes), arguments.seed)
    size_mb = arguments.path.stat().st_size / 1e6
    print(f"{arguments.path}: {size_mb:.0f} MB in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
