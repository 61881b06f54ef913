"""Files of llama2.c: seven numbers and float32 weights in a fixed order, in its first form and in version 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import unpack
from typing import Final

from llamaclust.tools.convert.checkpoint import Checkpoint
from llamaclust.tools.convert.lazy import Lazy, Storage, rows
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, MAX_WORDS, Settings
from llamaclust.tools.convert.source_files import SourceFile, SourceFiles

_MAGIC: Final = 0x616B3432
_OLD_HEADER: Final = 28
_HEADER: Final = 256
_EPSILON: Final = 1e-5

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
    is_old: bool

    @property
    def values(self) -> dict[str, object]:
        """In Hugging Face's words."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.words,
            "max_position_embeddings": self.context,
            "rms_norm_eps": _EPSILON,
            "tie_word_embeddings": self.tied,
        }


def is_llama2c(file: SourceFile) -> bool:
    """Whether a file begins with numbers that fit together and with its size."""
    if file.size_bytes < _HEADER:
        return False
    magic, version = unpack("<2I", file.read(0, 8))
    return magic == _MAGIC or (version < MAX_WIDTH and 0 < magic < MAX_WIDTH and _old_header(file) is not None)


def read_llama2c(files: SourceFiles, path: Path) -> Checkpoint:
    """The tokenizer is tokenizer.bin beside it, unless another one is named."""
    file = files.open(path)
    header = _read_header(file)
    tensors: dict[str, Lazy] = {}
    at = _OLD_HEADER if header.is_old else _HEADER
    for name, shape in _old_order(header) if header.is_old else _order(header):
        if name:
            whole = file.tensor(name, at, shape, Storage.F32)
            tensors |= _layers(name, whole, header.layers) if "{}" in name else {name: whole}
        at += 4 * prod(shape)
    if at != file.size_bytes:
        raise file.error(f"{file.size_bytes} bytes, {at} expected for its header: cut short, or no file of llama2.c")
    values = header.values
    return Checkpoint("Meta", Settings(values, str(path)), tensors, path.with_name("tokenizer.bin"), path.stem)


def _read_header(file: SourceFile) -> _Header:
    magic, version = unpack("<2I", file.read(0, 8))
    if magic != _MAGIC:
        header = _old_header(file)
        if header is None:
            raise file.error("no header of llama2.c")
        return header
    if version != 1:
        raise file.error(f"version {version} of llama2.c's format; only the first form and version 1 are supported")
    numbers = unpack("<7i", file.read(8, 28))
    header = _checked(numbers, tied=file.read(36, 1) == b"\1", is_old=False)
    if header is None:
        raise file.error(f"its header makes no sense: {list(numbers)}")
    return header


def _old_header(file: SourceFile) -> _Header | None:
    """A number of words below 0 says that the last matrix is not the embedding."""
    numbers = list(unpack("<7i", file.read(0, _OLD_HEADER)))
    tied = numbers[5] > 0
    numbers[5] = abs(numbers[5])
    return _checked(tuple(numbers), tied=tied, is_old=True)


def _checked(numbers: tuple[int, ...], *, tied: bool, is_old: bool) -> _Header | None:
    most = (MAX_WIDTH, MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEADS, MAX_WORDS, MAX_CONTEXT)
    if not all(0 < number <= limit for number, limit in zip(numbers, most, strict=True)):
        return None
    width, feed_forward, layers, heads, kv_heads, words, context = numbers
    if width % heads or heads % kv_heads:
        return None
    return _Header(width, feed_forward, layers, heads, kv_heads, words, context, tied, is_old)


def _layers(name: str, whole: Lazy, layers: int) -> dict[str, Lazy]:
    """A tensor of all layers as one for each."""
    count = whole.shape[0] // layers
    return {name.format(layer): rows(whole, layer * count, (layer + 1) * count) for layer in range(layers)}


def _old_order(header: _Header) -> Iterator[_Place]:
    norms = _norms(header)
    yield "tok_embeddings.weight", (header.words, header.width)
    yield norms[0]
    yield from _matrices(header)[:4]
    yield norms[1]
    yield from _matrices(header)[4:]
    yield norms[2]
    yield "", (header.context, header.width // header.heads)  # two tables of rotation
    if not header.tied:
        yield "output.weight", (header.words, header.width)


def _order(header: _Header) -> Iterator[_Place]:
    yield from _norms(header)
    yield "tok_embeddings.weight", (header.words, header.width)
    yield from _matrices(header)
    if not header.tied:
        yield "output.weight", (header.words, header.width)


def _norms(header: _Header) -> tuple[_Place, _Place, _Place]:
    shape = (header.layers * header.width,)
    names = ("layers.{}.attention_norm.weight", "layers.{}.ffn_norm.weight")
    return (names[0], shape), (names[1], shape), ("norm.weight", (header.width,))


def _matrices(header: _Header) -> list[_Place]:
    """Those of attention, then those of the feed-forward network, each for all layers."""
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
    return [(f"layers.{{}}.{name}.weight", (header.layers * n, k)) for name, (n, k) in shapes]
