"""Checks for each architecture that a PEFT adapter changes the same matrices at run time as when it is merged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.model.adapters import read_adapter
from llamaclust.model.checkpoints.modules import matrix_name
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.converters import CONVERTERS
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.merging import merge_adapter
from support.models.checkpoint_files import safetensors_bytes, write_hugging_face
from support.models.checkpoints.shapes import LAYERS
from support.models.random_checkpoints import CASES, checkpoint, values
from support.models.tiny_tokenizers import tokenizer_json

RANK, ALPHA = 4, 6
ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_output"}
WANTED = {
    "LlamaForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "MistralForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "SmolLM3ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Ministral3ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "MixtralForCausalLM": ATTENTION,
    "GptOssForCausalLM": ATTENTION,
    "Glm4MoeForCausalLM": ATTENTION,
    "Qwen2ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Qwen2MoeForCausalLM": ATTENTION,
    "Qwen3ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Qwen3MoeForCausalLM": ATTENTION,
    "Qwen3NextForCausalLM": ATTENTION,
    "Qwen3_5ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Qwen3_5MoeForCausalLM": ATTENTION,
    "GlmForCausalLM": ATTENTION | {"ffn_up", "ffn_down"},
    "Glm4ForCausalLM": ATTENTION | {"ffn_up", "ffn_down"},
    "Olmo2ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Olmo3ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "SeedOssForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Ernie4_5ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Exaone4ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "GraniteForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "GraniteMoeSharedForCausalLM": ATTENTION,
    "Ernie4_5_MoeForCausalLM": ATTENTION,
    "HunYuanDenseV1ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "HunYuanMoEV1ForCausalLM": ATTENTION,
    "MiniMaxM2ForCausalLM": ATTENTION,
    "Cohere2ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Phi3ForCausalLM": {"attn_qkv", "attn_output", "ffn_up", "ffn_down"},
    "GemmaForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Gemma2ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Gemma3ForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Gemma3nForCausalLM": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Gemma4ForCausalLM experts": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Gemma4ForCausalLM inputs": ATTENTION | {"ffn_gate", "ffn_up", "ffn_down"},
    "Starcoder2ForCausalLM": ATTENTION | {"ffn_up", "ffn_down"},
    "GPT2LMHeadModel": {"attn_qkv", "attn_output", "ffn_up", "ffn_down"},
}
"""Matrices of a layer that adapters change directly, by class."""


@pytest.mark.parametrize("case", CASES)
def test_merged_matrices_are_those_of_the_model_and_the_adapter(case: str, tmp_path: Path) -> None:
    config, tensors = checkpoint(case)
    write_hugging_face(tmp_path / "base", config, tensors)
    (tmp_path / "base" / "tokenizer.json").write_text(tokenizer_json())
    architecture = CONVERTERS[case.split()[0]][0]
    adapter, count = write_adapter(tmp_path / "adapter", architecture, tensors, case == "GPT2LMHeadModel")
    convert(tmp_path / "base", tmp_path / "base.gguf", "f32", Hints(), lambda done, total: None, None)
    base = open_model(tmp_path / "base.gguf")
    wanted = {f"blk.{layer}.{name}.weight" for layer in range(LAYERS) for name in WANTED.get(case, ())}
    assert count == len(wanted & base.tensors.keys()) and count >= len(wanted) // 2, case
    if not count:
        return
    merge_adapter(tmp_path / "base", adapter, tmp_path / "merged.gguf", "f32", Hints(), lambda done, total: None)
    merged = open_model(tmp_path / "merged.gguf")
    factors = read_adapter(adapter, base).tensors
    for name in base.tensors:
        expected = floats(base.tensor(name))
        if f"{name}.lora_a" in factors:
            down, up = (floats(factors[f"{name}.lora_{half}"]) for half in "ab")
            expected = expected + ALPHA / RANK * (up @ down)
            count -= 1
        np.testing.assert_allclose(floats(merged.tensor(name)), expected, atol=1e-5, err_msg=name)
    assert count == 0


def write_adapter(
    folder: Path, architecture: str, tensors: dict[str, NDArray[np.float32]], is_exchanged: bool
) -> tuple[Path, int]:
    """Writes an adapter of all matrices that it may change, except those of an MTP head; returns its folder and their
    number."""
    parts = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and f"layers.{LAYERS}." not in module and matrix_name(architecture, module):
            rows, columns = weight.shape[::-1] if is_exchanged else weight.shape
            for kind, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                parts[f"base_model.model.{module}.lora_{kind}.weight"] = values(f"{module}{kind}", shape)
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": is_exchanged}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(parts))
    return folder, len(parts) // 2


def floats(tensor: Tensor) -> NDArray[np.float32]:
    return np.frombuffer(tensor.read(), "<f4").reshape(tensor.shape)
