"""Writes a LoRA adapter with random weights, for trials. Usage: python examples/random_adapter.py MODEL OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType

RANK = 4
ALPHA = 8.0
PARTS = (".attn_q.weight", ".attn_v.weight", ".ffn_up.weight")
GAIN = 0.2
"""Standard deviation of the values that the adapter adds, if its input has standard deviation 1."""


def write_adapter(model: Path, out: Path) -> None:
    """Writes an adapter for the matrices whose names end with one of PARTS."""
    file, random = open_model(model), np.random.default_rng(1)
    sources = []
    for tensor in file.tensors.values():
        if tensor.layer and tensor.name.endswith(PARTS):
            rows, width = tensor.shape
            for half, shape, gain in (
                ("a", (RANK, width), width**-0.5),
                ("b", (rows, RANK), GAIN * RANK**0.5 / ALPHA),
            ):
                weights = np.float32(gain) * random.standard_normal(shape, np.float32)
                name = f"{tensor.name}.lora_{half}"
                sources.append(TensorSource(name, QuantType.F32, shape, weights.tobytes))
    metadata = {
        "general.architecture": file.metadata_str("general.architecture"),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(ALPHA),
    }
    write_gguf(out, metadata, sources)


if __name__ == "__main__":
    write_adapter(resolve_model(sys.argv[1]), Path(sys.argv[2]))
