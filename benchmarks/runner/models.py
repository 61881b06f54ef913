"""Makes temporary models of random weights for cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from shape import LAYOUTS, SHAPES, Shape, metadata, random_matrix, tensors, write_shape

from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType
from runner.options import chosen, listed

TYPES = {quant_type.name: quant_type for quant_type in LAYOUTS}


def types_of(text: str) -> tuple[QuantType, ...]:
    return tuple(LAYOUTS) if text == "all" else listed(chosen("type", TYPES))(text)


ADDING = ("attn_output.weight", "ffn_down.weight")
"""Name endings of matrices whose products are added to the hidden state."""


@contextmanager
def model_of(quant_type: QuantType, shape: str, models: Path | None = None) -> Iterator[Path]:
    if models is not None and (models / f"{quant_type.name}.gguf").exists():
        yield models / f"{quant_type.name}.gguf"
        return
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        path = Path(folder) / f"{quant_type.name}.gguf"
        write_shape(path, shape, SHAPES[shape], quant_type)
        yield path


def write_weakened(path: Path, shape: Shape, quant_type: QuantType, first: int = 0, strength: float = 0.0) -> None:
    sources = tensors(shape, quant_type, 1, alike=True)
    write_gguf(path, metadata("random", shape, quant_type), (_weakened(each, first, strength) for each in sources))


def _weakened(source: TensorSource, first: int, strength: float) -> TensorSource:
    _, _, name = source.name.partition("blk.")
    if not name.endswith(ADDING) or int(name.split(".")[0]) < first:
        return source
    if not strength:
        return replace(source, produce=lambda: memoryview(bytes(source.n_bytes)))
    generator = np.random.default_rng(len(name))
    return replace(source, produce=lambda: random_matrix(generator, source.quant_type, source.shape, strength))
