"""LoRA adapters with random weights for any model, and models with merged adapters."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import LazyStrings
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.checkpoint_files import safetensors_bytes

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_STORED = {QuantType.F32: np.float32, QuantType.F16: np.float16, QuantType.BF16: np.uint16}
_GAIN = 0.5
"""Standard deviation of what an adapter adds to a product of standard normal numbers."""


def build_adapter(
    path: Path,
    model: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    parts: tuple[str, ...] = PARTS,
    quant_type: QuantType = QuantType.F32,
    seed: int = 1,
) -> Path:
    """Writes an adapter of the model's matrices whose names contain one of `parts`. Equal arguments give equal
    bytes."""
    file = open_model(model)
    sources = []
    for tensor in file.tensors.values():
        if tensor.layer and len(tensor.shape) == 2 and any(f".{part}." in tensor.name for part in parts):
            rows, width = tensor.shape
            gains = {"a": 1 / width**0.5, "b": _GAIN / (alpha or rank) * rank**0.5}
            for half, shape in (("a", (rank, width)), ("b", (rows, rank))):
                weights = _random(f"{tensor.name} {half}", shape, seed) * np.float32(gains[half])
                sources.append(_source(f"{tensor.name}.lora_{half}", quant_type, weights))
    metadata: dict[str, WritableValue] = {
        "general.architecture": file.metadata_str("general.architecture"),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
    }
    write_gguf(path, metadata, sources)
    return path


def build_peft(folder: Path, model: Path, adapter: Path, **config: object) -> Path:
    """Writes an adapter of a LLaMA model in PEFT's format."""
    file, added = open_model(model), open_adapter(adapter)
    heads = {"attn_q": file.metadata_int("llama.attention.head_count")}
    heads["attn_k"] = file.metadata_int("llama.attention.head_count_kv")
    tensors = {}
    for tensor in added.tensors.values():
        _, layer, part, _, half = tensor.name.split(".")
        weights = np.frombuffer(tensor.read(), _STORED[tensor.quant_type]).reshape(tensor.shape)
        if half == "lora_b" and part in heads:
            weights = weights.reshape(heads[part], -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        tensors[f"base_model.model.model.layers.{layer}.{MODULES[part]}.lora_{half[-1].upper()}.weight"] = weights
        rank = tensor.shape[half == "lora_b"]
    folder.mkdir()
    alpha = added.metadata_float("adapter.lora.alpha")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def build_merged(path: Path, model: Path, adapter: Path, scale: float) -> Path:
    """Writes the model with weight + scale * alpha / rank * b @ a in float32 in place of each adapted matrix."""
    file, added = open_model(model), open_adapter(adapter)
    alpha = added.metadata_float("adapter.lora.alpha")
    sources = []
    for tensor in file.tensors.values():
        weights, kind = _floats(tensor), QuantType.F32
        if f"{tensor.name}.lora_a" in added.tensors:
            down, up = (_floats(added.tensors[f"{tensor.name}.lora_{half}"]).astype(np.float64) for half in "ab")
            weights = (weights + scale * alpha / len(down) * (up @ down)).astype(np.float32)
        sources.append(_source(tensor.name, kind, weights))
    write_gguf(path, {key: _writable(value) for key, value in file.metadata.items()}, sources)
    return path


def open_adapter(path: Path) -> ModelFile:
    return open_model(path)


def _random(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)


def _source(name: str, kind: QuantType, weights: NDArray[np.float32]) -> TensorSource:
    match kind:
        case QuantType.F16:
            data = weights.astype(np.float16).tobytes()
        case QuantType.BF16:
            data = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case _:
            data = weights.tobytes()
    return TensorSource(name, kind, weights.shape, lambda: data)


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    values = dequantize(tensor.quant_type, tensor.read(), tensor.rows * tensor.shape[-1])
    return values.reshape(tensor.shape)


def _writable(value: object) -> WritableValue:
    if isinstance(value, LazyStrings):
        return list(value)
    return value  # type: ignore[return-value]
