"""Checks that MXFP4 experts of gpt-oss keep every number in GGUF's bit order; other blocks are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.architectures import build_program
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.merging import merge_adapter
from support.models.checkpoint_files import safetensors_bytes, write_hugging_face
from support.models.checkpoints.shapes import HIDDEN, INNER, LAYERS
from support.models.converted import converted_checkpoint as converted
from support.models.random_checkpoints import checkpoint
from support.models.tiny_tokenizers import tokenizer_json

COUNT = 4
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 4-bit codes in OCP's specification of MX formats."""
Arrays = dict[str, NDArray[Any]]


def packed_checkpoint(seed: int) -> tuple[dict[str, Any], Arrays]:
    generator = np.random.default_rng(seed)
    config, plain = checkpoint("GptOssForCausalLM")
    tensors: Arrays = {}
    for name, values in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, columns, rows = values.shape
            tensors[f"{name}_blocks"] = generator.integers(0, 256, (count, rows, columns // 32, 16), np.uint8)
            tensors[f"{name}_scales"] = generator.integers(1, 250, (count, rows, columns // 32), np.uint8)
        else:
            tensors[name] = values
    return config | {"quantization_config": {"quant_method": "mxfp4"}}, tensors


def numbers(tensors: Arrays, name: str) -> NDArray[np.float32]:
    """Returns [experts, rows, columns]; the lower bits of each byte come first."""
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    both = np.stack([NUMBERS[blocks & 15], NUMBERS[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
    found: NDArray[np.float32] = np.ldexp(both, scales[..., None].astype(np.int32) - 127)
    return found.reshape(*blocks.shape[:2], -1)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_blocks_keep_their_numbers_whatever_the_type(kind: str, tmp_path: Path) -> None:
    config, tensors = packed_checkpoint(3)
    model = converted(tmp_path, config, tensors, kind)
    for layer in range(LAYERS):
        source = f"model.layers.{layer}.mlp.experts"
        both, down = numbers(tensors, f"{source}.gate_up_proj"), numbers(tensors, f"{source}.down_proj")
        bias = tensors[f"{source}.gate_up_proj_bias"]
        for part, wanted in (("gate", both[:, ::2]), ("up", both[:, 1::2]), ("down", down)):
            tensor = model.tensor(f"blk.{layer}.ffn_{part}_exps.weight")
            assert tensor.quant_type is QuantType.MXFP4 and tensor.shape == wanted.shape
            found = dequantize(QuantType.MXFP4, tensor.read(), wanted.size).reshape(wanted.shape)
            np.testing.assert_array_equal(found, wanted)
        for part, first in (("gate", 0), ("up", 1)):
            found = np.frombuffer(model.tensor(f"blk.{layer}.ffn_{part}_exps.bias").read(), "<f4")
            np.testing.assert_array_equal(found, bias[:, first::2].reshape(-1))
    assert model.metadata["general.file_type"] == (7 if kind == "q8_0" else 38)
    assert build_program(model, 0, LAYERS).weights


def test_floats_are_brought_to_rows_and_gate_and_up_apart(tmp_path: Path) -> None:
    config, tensors = checkpoint("GptOssForCausalLM")
    model = converted(tmp_path, config, tensors, "f32")
    both = tensors["model.layers.1.mlp.experts.gate_up_proj"].swapaxes(1, 2)
    down = tensors["model.layers.1.mlp.experts.down_proj"].swapaxes(1, 2)
    for part, wanted in (("gate", both[:, ::2]), ("up", both[:, 1::2]), ("down", down)):
        found = np.frombuffer(model.tensor(f"blk.1.ffn_{part}_exps.weight").read(), "<f4").reshape(wanted.shape)
        np.testing.assert_array_equal(found, wanted)
    assert model.metadata["general.file_type"] == 0


_DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{_DOWN}_scales": None}, "down_proj_scales': missing"),
        ({f"{_DOWN}_blocks": None}, "down_proj': missing"),
        (
            {f"{_DOWN}_scales": np.zeros((COUNT, HIDDEN, 2), np.uint8)},
            r"expected shape \[4, 64, 3\], found \[4, 64, 2\]",
        ),
        ({f"{_DOWN}_blocks": np.zeros((COUNT, HIDDEN, 3, 16), np.float32)}, "expected bytes, found .*"),
        (
            {f"{_DOWN}_blocks": np.zeros((COUNT, HIDDEN, 3, 8), np.uint8)},
            r"expected shape \[4, 64, 3, 16\], found \[4, 64, 3, 8\]",
        ),
        ({_DOWN: np.zeros((COUNT, INNER, HIDDEN), np.float32)}, "not a tensor of gpt-oss"),
    ],
)
def test_blocks_that_do_not_fit_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, tensors = packed_checkpoint(4)
    changed = {name: values for name, values in (tensors | change).items() if values is not None}
    with pytest.raises(ModelFileError, match=message):
        converted(tmp_path, config, changed)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_width_that_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    config, tensors = packed_checkpoint(5)
    source = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[f"{source}_blocks"] = np.zeros((COUNT, 200, 2, 16), np.uint8)
    tensors[f"{source}_scales"] = np.zeros((COUNT, 200, 2), np.uint8)
    tensors[f"{source}_bias"] = np.zeros((COUNT, 200), np.float32)
    with pytest.raises(ModelFileError, match="'intermediate_size': expected a multiple of 32, found 100"):
        converted(tmp_path, config | {"intermediate_size": 100}, tensors)


def test_the_bounds_of_a_stretched_rotation_that_are_not_rounded_are_kept(tmp_path: Path) -> None:
    config, tensors = checkpoint("GptOssForCausalLM")
    said = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False}
    model = converted(tmp_path, config | {"rope_scaling": said}, tensors)
    assert model.metadata["gpt-oss.rope.scaling.yarn_truncate"] is False


def test_an_adapter_is_merged_to_a_file_and_to_no_folder(tmp_path: Path) -> None:
    config, tensors = packed_checkpoint(6)
    write_hugging_face(tmp_path / "base", config, tensors)
    (tmp_path / "base/tokenizer.json").write_text(tokenizer_json())
    module, generator = "model.layers.0.self_attn.o_proj", np.random.default_rng(6)
    down, up = generator.standard_normal((2, 2, HIDDEN), np.float32)
    parts = {f"base_model.model.{module}.lora_{half}.weight": values for half, values in (("A", down), ("B", up.T))}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(safetensors_bytes(parts))

    def merged(name: str) -> Path:
        merge_adapter(
            tmp_path / "base", tmp_path / "adapter", tmp_path / name, "f32", Hints(), lambda done, total: None
        )
        return tmp_path / name

    model = open_model(merged("out.gguf"))
    found = np.frombuffer(model.tensor("blk.0.attn_output.weight").read(), "<f4").reshape(HIDDEN, HIDDEN)
    np.testing.assert_allclose(found, tensors[f"{module}.weight"] + up.T @ down, atol=1e-5)
    assert model.tensor("blk.0.ffn_down_exps.weight").quant_type is QuantType.MXFP4
    with pytest.raises(
        UsageError, match=r"a base model with mxfp4 weights can only be merged into a GGUF file; give a name"
    ):
        merged("folder")
    assert not (tmp_path / "folder").exists()
