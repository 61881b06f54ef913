"""Models and helpers for tests of whole stages on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.kernels.cuda.runtime.device import Device
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.arithmetic.batches import Chain
from support.arithmetic.matmul_cases import check_equal_bits
from support.cuda.shim_device import ShimDevice

LIMITS = StageLimits(max_batch_tokens=32, max_outputs=32, max_sequences=4, max_context_tokens=128, kv_blocks=24)
SMALL: dict[str, Any] = {"layers": 3, "heads": 4, "vocabulary": 320}
QUANTIZED: dict[str, dict[str, Any]] = {
    "llama": {
        "quant_type": QuantType.Q4_K,
        "ffn": 256,
        "other_types": {"attn_v": QuantType.Q6_K, "ffn_gate": QuantType.Q8_0, "attn_k": QuantType.F16},
    },
    "moe": {"experts": 4, "quant_type": QuantType.Q8_0, "hidden": 64, "ffn": 96},
}
MODELS = (
    *(*QUANTIZED, "llama-experts", "gemma2", "gpt2", "qwen2moe", "qwen3", "cohere2"),
    *("gpt-oss", "gpt-oss-mxfp4", "glm4moe", "ernie4_5-moe", "hunyuan-moe", "bailingmoe2", "minimax-m2", "granitemoe"),
    *("mistral3", "gemma4", "gemma4-experts", "gemma4-inputs", "gemma3n"),
    *("deepseek2", "deepseek2-lite", "deepseek2-scaled", "mistral4"),
    *("lfm2", "lfm2-windows", "lfm2moe", "qwen3next", "qwen3next-old", "qwen35", "qwen35moe", "kimi-linear"),
    *("granitehybrid", "granitehybrid-experts", "falcon-h1", "falcon-h1-norm", "nemotron_h", "nemotron_h_moe-latent"),
    *("llama4", "llama4-maverick"),
)
ROWS = 20

Open = Callable[[str], Model]


@dataclass(frozen=True, slots=True)
class Free:
    """The free memory of a device at one time. `taken` is 0 on a real GPU, whose driver allocates memory as well."""

    device: Device
    n_bytes: int

    @classmethod
    def of(cls, device: Device) -> Free:
        return cls(device, device.free_bytes)

    @property
    def is_exact(self) -> bool:
        return isinstance(self.device, ShimDevice)

    @property
    def taken(self) -> int:
        return self.n_bytes - self.device.free_bytes if self.is_exact else 0


def random_tokens(model: Model, count: int = ROWS) -> list[int]:
    seed = 7
    tokens: list[int] = np.random.default_rng(seed).integers(3, model.hyperparameters.vocabulary_size, count).tolist()
    return tokens


def same(found: Float32, wanted: Float32) -> None:
    check_equal_bits(found, wanted)
    assert np.isfinite(wanted).all() and wanted.std() > 0.1


def run(backend: Backend, model: Model, tokens: Sequence[int], chunk: int, limits: StageLimits = LIMITS) -> Float32:
    chain = Chain(backend, model, limits=limits)
    try:
        return chain.logits(tokens, chunk)
    finally:
        chain.close()
