"""Reads llama2.c files: a header, then weights in a fixed order. Version 2 has int8 weights with scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from math import prod
from pathlib import Path
from struct import unpack
from typing import Final

import numpy as np

from llamaclust.model.checkpoints.settings import MAX_WIDTH, Settings
from llamaclust.model.checkpoints.source_file import SourceFile
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.tools.convert.formats.source_files import SourceFiles, lazy_tensor
from llamaclust.tools.convert.lazy import Array, Lazy, rows
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_WORDS, Checkpoint

_MAGIC: Final = 0x616B3432
_OLD_HEADER: Final = 28
_HEADER: Final = 256
_EPSILON: Final = 1e-5

_NUMBERS: Final = {
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "vocab_size": MAX_WORDS,
    "max_position_embeddings": MAX_CONTEXT,
}
"""Maps Hugging Face's names for the seven numbers of the header, in their order, to the maximum values."""

_Place = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Header:
    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    words: int
    context: int
    tied: bool
    version: int = 0  # 0 for files without a version.
    group: int = 0  # Number of weights that share a scale in version 2.

    @property
    def values(self) -> dict[str, object]:
        numbers = dict(zip(_NUMBERS, astuple(self), strict=False))
        return {**numbers, "rms_norm_eps": _EPSILON, "tie_word_embeddings": self.tied}


def is_llama2c(file: SourceFile) -> bool:
    if file.size_bytes < _HEADER:
        return False
    magic, version = unpack("<2I", file.read(0, 8))
    return magic == _MAGIC or (version < MAX_WIDTH and 0 < magic < MAX_WIDTH and _old_header(file) is not None)


def read_llama2c(files: SourceFiles, path: Path) -> Checkpoint:
    file = files.open(path)
    header = _read_header(file)
    tensors: dict[str, Lazy] = {}
    at = _HEADER if header.version else _OLD_HEADER
    for name, shape in _order(header) if header.version else _old_order(header):
        if header.version == 2 and len(shape) == 2:
            found, at = _quantized(file, header, name, shape, at)
            tensors |= found
            continue
        if name:
            whole = lazy_tensor(file, name, at, shape, Storage.F32)
            tensors |= _layers(name, whole, header.layers) if "{}" in name else {name: whole}
        at += 4 * prod(shape)
    if at != file.size_bytes:
        raise file.error(
            f"the header requires {at} bytes, but the file has {file.size_bytes}: it is cut short, or not from llama2.c"
        )
    values = header.values
    return Checkpoint("Meta", Settings(values, str(path)), tensors, path.with_name("tokenizer.bin"), path.stem)


def _read_header(file: SourceFile) -> _Header:
    magic, version = unpack("<2I", file.read(0, 8))
    if magic != _MAGIC:
        header = _old_header(file)
        if header is None:
            raise file.error("the header is not a llama2.c header")
        return header
    if version not in (1, 2):
        raise file.error(
            f"version {version} of llama2.c's format is not supported; supported: unversioned files, 1 and 2"
        )
    numbers = unpack("<7i", file.read(8, 28))
    header = _checked(numbers, tied=file.read(36, 1) == b"\1")
    if header is None:
        raise file.error(f"the header has impossible sizes: {list(numbers)}")
    (group,) = unpack("<i", file.read(37, 4)) if version == 2 else (0,)
    if version == 2 and not 0 < group <= header.width:
        raise file.error(f"expected groups of 1 to {header.width} weights, found {group}")
    return replace(header, version=version, group=group)


def _old_header(file: SourceFile) -> _Header | None:
    *numbers, words, context = unpack("<7i", file.read(0, _OLD_HEADER))
    return _checked((*numbers, abs(words), context), tied=words > 0)


def _checked(numbers: tuple[int, ...], *, tied: bool) -> _Header | None:
    if not all(0 < number <= limit for number, limit in zip(numbers, _NUMBERS.values(), strict=True)):
        return None
    width, feed_forward, layers, heads, kv_heads, words, context = numbers
    if width % heads or heads % kv_heads:
        return None
    return _Header(width, feed_forward, layers, heads, kv_heads, words, context, tied)


def _layers(name: str, whole: Lazy, layers: int) -> dict[str, Lazy]:
    count = whole.shape[0] // layers
    return {name.format(layer): rows(whole, layer * count, (layer + 1) * count) for layer in range(layers)}


def _quantized(
    file: SourceFile, header: _Header, name: str, shape: tuple[int, ...], at: int
) -> tuple[dict[str, Lazy], int]:
    """Reads one int8 matrix per layer. Returns the matrices and the offset of the next matrix."""
    layers = header.layers if "{}" in name else 1
    shape = (shape[0] // layers, shape[1])
    count = prod(shape)
    if count % header.group:
        raise file.error(f"{name}: expected a multiple of {header.group} weights, found {count}")
    found = {}
    for layer in range(layers):
        numbers = lazy_tensor(file, name, at, shape, Storage.I8)
        scales = lazy_tensor(file, name, at + count, (count // header.group,), Storage.F32)
        found[name.format(layer)] = _scaled(numbers, scales, header.group)
        at += count + scales.n_bytes
    return found, at


def _scaled(numbers: Lazy, scales: Lazy, group: int) -> Lazy:
    """Multiplies each group of numbers by its scale. A group may extend over several rows."""
    width = numbers.row_elements

    def read(start: int, end: int) -> Array:
        first, last = start * width // group, -(-end * width // group)
        each = np.repeat(scales.read(first, last), group)[start * width - first * group :]
        values: Array = numbers.read(start, end).astype(np.float32)
        values *= each[: values.size].reshape(values.shape)
        return values

    return Lazy(numbers.shape, Storage.F32, read, numbers.origin)


def _old_order(header: _Header) -> Iterator[_Place]:
    attention_norm, feed_forward_norm, last_norm = _norms(header)
    embedding, *matrices = _matrices(header)
    yield from (embedding, attention_norm, *matrices[:4], feed_forward_norm, *matrices[4:], last_norm)
    yield "", (header.context, header.width // header.heads)  # Skips the cosines and sines of the rotation.
    if not header.tied:
        yield "output.weight", (header.words, header.width)


def _order(header: _Header) -> Iterator[_Place]:
    yield from (*_norms(header), *_matrices(header))
    if not header.tied:
        yield "output.weight", (header.words, header.width)


def _norms(header: _Header) -> tuple[_Place, _Place, _Place]:
    shape = (header.layers * header.width,)
    names = ("layers.{}.attention_norm.weight", "layers.{}.ffn_norm.weight")
    return (names[0], shape), (names[1], shape), ("norm.weight", (header.width,))


def _matrices(header: _Header) -> list[_Place]:
    width, inner = header.width, header.feed_forward
    key = width // header.heads * header.kv_heads
    shapes = (
        ("attention.wq", (width, width)),
        ("attention.wk", (key, width)),
        ("attention.wv", (key, width)),
        ("attention.wo", (width, width)),
        ("feed_forward.w1", (inner, width)),
        ("feed_forward.w2", (width, inner)),
        ("feed_forward.w3", (inner, width)),
    )
    of_layers = [(f"layers.{{}}.{name}.weight", (header.layers * n, k)) for name, (n, k) in shapes]
    return [("tok_embeddings.weight", (header.words, width)), *of_layers]
