"""Writes a model again in F16, padded with zeros so that types with blocks of 256 fit. Results stay the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType

_DEADLINE_S = 1800


def llamaclust(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "llamaclust", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    if done.returncode:
        raise LlamaclustError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def told(*arguments: str | Path) -> Any:
    return json.loads(llamaclust(*arguments, "--json"))


@dataclass(frozen=True, slots=True)
class PaddedModels:
    narrow: Path
    padded: Path
    matrix: Path
    logits: Path
    perplexity: float

    @classmethod
    def of(cls, name: str, hidden: int, text: Path, chunks: int, folder: Path) -> PaddedModels:
        narrow, padded = resolve_model(name), folder / "padded.gguf"
        write_padded(narrow, padded, hidden)
        words = text.read_text()
        half = folder / "half.txt"
        half.write_text(words[len(words) // 2 :])
        matrix, logits = folder / "imatrix.gguf", folder / "logits"
        llamaclust("model", "imatrix", padded, "-f", half, "-o", matrix, "--chunks", "32")
        keeping = ("--chunks", str(chunks), "--kl-divergence-base", logits)
        base = told("model", "perplexity", padded, "-f", text, *keeping)
        return cls(narrow, padded, matrix, logits, base["perplexity"])


def write_padded(source: Path, out: Path, hidden: int) -> None:
    """Writes a model with `hidden` channels, and with more heads of the same width. The added zeros reduce the mean
    square in norms, so the weights and epsilons of norms are scaled."""
    model = open_model(source)
    key = model.metadata_str("general.architecture")
    was = model.metadata_int(f"{key}.embedding_length")
    heads, pairs = (model.metadata_int(f"{key}.attention.head_count{end}") for end in ("", "_kv"))
    head = was // heads
    share = heads // pairs
    assert hidden % (head * share) == 0, f"{hidden} is no multiple of {head * share}"
    wide = {was: hidden, pairs * head: hidden // share}
    assert len(wide) == 2, "hidden state and keys of one width"
    epsilon = f"{key}.attention.layer_norm_rms_epsilon"
    metadata = {
        **model.metadata,
        "general.file_type": 1,
        f"{key}.embedding_length": hidden,
        f"{key}.attention.head_count": hidden // head,
        f"{key}.attention.head_count_kv": hidden // head // share,
        epsilon: model.metadata_float(epsilon) * was / hidden,
    }
    sources = [_source(tensor, wide, (was / hidden) ** 0.5) for tensor in model.tensors.values()]
    write_gguf(out, metadata, sources)


def _source(tensor: Tensor, wide: Mapping[int, int], norm_scale: float) -> TensorSource:
    shape = tuple(wide.get(size, size) for size in tensor.shape)
    kind, dtype = (QuantType.F32, np.float32) if len(shape) == 1 else (QuantType.F16, np.float16)
    scale = norm_scale if tensor.name.endswith("_norm.weight") else 1.0
    return TensorSource(tensor.name, kind, shape, _padding(tensor, shape, scale, dtype))


def _padding(tensor: Tensor, shape: tuple[int, ...], scale: float, dtype: type[np.generic]) -> Callable[[], bytes]:
    def produce() -> bytes:
        x = dequantize(tensor.quant_type, tensor.read(), int(np.prod(tensor.shape))).reshape(tensor.shape)
        padded = np.pad(x * np.float32(scale), [(0, now - then) for now, then in zip(shape, tensor.shape, strict=True)])
        return padded.astype(dtype).tobytes()

    return produce
