"""Tests of the conversion of latent attention: places of numbers, keys, and unsupported settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import convert_checkpoint
from llamaclust.tools.convert.lazy import constant
from llamaclust.tools.convert.quantized import E4M3
from llamaclust.tools.convert.settings import Checkpoint
from support.models.checkpoints.latent import PLAIN, RANK, VALUE
from support.models.checkpoints.shapes import HEADS, LAYERS
from support.models.converted import converted_checkpoint as converted
from support.models.random_checkpoints import checkpoint

V2, V3, GLM = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"
MISTRAL4, KIMI = "Mistral4ForCausalLM", "KimiLinearForCausalLM"
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


def read(model: ModelFile, name: str) -> NDArray[np.float32]:
    tensor = model.tensor(name)
    assert tensor.quant_type is QuantType.F32
    return np.frombuffer(tensor.read(), "<f4").reshape(tensor.shape)


def model_of(case: str, folder: Path, tensors: dict[str, NDArray[Any]] | None = None, **change: Any) -> ConvertedModel:
    config, plain = checkpoint(case)
    lazy = {name: constant(values, name) for name, values in (tensors or plain).items()}
    return convert_checkpoint(Checkpoint(case, Settings(config | change, "config.json"), lazy, folder, "tiny"))


def check_cut(model: ModelFile, layer: int, both: NDArray[np.float32]) -> None:
    by_head = both.reshape(HEADS, PLAIN + VALUE, RANK)
    np.testing.assert_array_equal(read(model, f"blk.{layer}.attn_k_b.weight"), by_head[:, :PLAIN].swapaxes(1, 2))
    np.testing.assert_array_equal(read(model, f"blk.{layer}.attn_v_b.weight"), by_head[:, PLAIN:])


@pytest.mark.parametrize("case", [V2, V3, GLM, MISTRAL4])
def test_the_matrix_of_keys_and_values_is_cut_head_by_head(case: str, tmp_path: Path) -> None:
    config, tensors = checkpoint(case)
    model = converted(tmp_path, config, tensors)
    for layer in range(LAYERS):
        check_cut(model, layer, tensors[f"model.layers.{layer}.self_attn.kv_b_proj.weight"])


def test_blocks_of_eight_bits_are_cut_too(tmp_path: Path) -> None:
    """Checks 8-bit blocks as in DeepSeek V3, whose borders are not those of heads."""
    config, plain = checkpoint(V3)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    generator = np.random.default_rng(9)
    rows, columns = plain[name].shape
    weights = generator.integers(0, 120, (rows, columns), np.uint8)
    scales = generator.random((-(-rows // 48), -(-columns // 20)), np.float32)
    tensors = plain | {name: weights, f"{name}_scale_inv": scales}
    said = {"quant_method": "fp8", "weight_block_size": [48, 20]}
    model = converted(tmp_path, config | {"quantization_config": said}, tensors)
    each = np.kron(scales, np.ones((48, 20), np.float32))[:rows, :columns]
    check_cut(model, 1, E4M3[weights] * each)


def test_layers_of_predictions_are_left_out_of_deepseek_and_kept_of_glm(tmp_path: Path) -> None:
    tensors = checkpoint(V3)[1]
    behind = {name.replace("layers.1.", "layers.2."): values for name, values in tensors.items() if "layers.1." in name}
    behind["model.layers.2.eh_proj.weight"] = np.ones((4, 8), np.float32)
    model = model_of(V3, tmp_path, {**tensors, **behind}, num_nextn_predict_layers=1)
    assert model.tensors.keys() == model_of(V3, tmp_path).tensors.keys() and len(model.notes) == 1
    glm = model_of(GLM, tmp_path)
    assert f"blk.{LAYERS}.nextn.eh_proj.weight" in glm.tensors and f"blk.{LAYERS}.attn_k_b.weight" in glm.tensors
    assert glm.metadata["deepseek2.nextn_predict_layers"] == 1 and glm.metadata["deepseek2.block_count"] == LAYERS + 1
    assert glm.vocabulary_rules == "glm4moe"


def test_gating_groups_and_stretched_rotations(tmp_path: Path) -> None:
    """Checks that YaRN's multiplier is a tenth of `mscale_all_dim`, as llama.cpp writes it for this architecture."""
    scaling = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
    found = {case: model_of(case, tmp_path, rope_scaling=scaling).metadata for case in (V2, V3, GLM, MISTRAL4)}
    names = {case: "mistral4" if case == MISTRAL4 else "deepseek2" for case in found}
    gating = {case: keys[f"{names[case]}.expert_gating_func"] for case, keys in found.items()}
    assert gating == {V2: 1, V3: 2, GLM: 2, MISTRAL4: 1}
    groups = {case: keys.get(f"{names[case]}.expert_group_count") for case, keys in found.items()}
    assert groups == {V2: None, V3: 2, GLM: None, MISTRAL4: None}
    for case, keys in found.items():
        assert keys[f"{names[case]}.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert "deepseek2.rope.scaling.attn_factor" not in found[V3]


def test_decays_and_convolutions_of_kimi_stay_exact(tmp_path: Path) -> None:
    config, tensors = checkpoint(KIMI)
    model = converted(tmp_path, config, tensors, "f16")
    source = "model.layers.0.self_attn"
    decay = -np.exp(tensors[f"{source}.A_log"]).reshape(HEADS, 1)
    np.testing.assert_array_equal(read(model, "blk.0.ssm_a"), decay)
    for part in "qkv":
        convolution = tensors[f"{source}.{part}_conv1d.weight"]
        np.testing.assert_array_equal(read(model, f"blk.0.ssm_conv1d_{part}.weight"), convolution)
    np.testing.assert_array_equal(model.metadata["kimi-linear.attention.head_count_kv"], [0, 1])


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (V2, {"topk_method": "group_limited_greedy", "n_group": 2}, "is not supported; expected greedy"),
        (V2, {"topk_method": "a" * 9999, "n_group": 2}, r"'a{61}\.\.\.' is not supported; expected greedy"),
        (V2, {"rope_scaling": {"type": "a" * 9999}}, r"'a{61}\.\.\.' is not supported; deepseek2 supports yarn"),
        (V2, {"norm_topk_prob": True}, "true is not supported by DeepSeek V2"),
        (V2, {"scoring_func": "sigmoid"}, "expected softmax, found 'sigmoid'"),
        (V2, {"moe_layer_freq": 2}, "'moe_layer_freq': 2 is not supported; expected 1"),
        (V2, {"rope_scaling": YARN}, r"'mscale_all_dim': None, and mscale is None; deepseek2 needs two equal"),
        (
            V2,
            {"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": 0.5}},
            "0.5, and mscale is 1; deepseek2 needs two",
        ),
        (V2, {"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is not supported; deepseek2 supports yarn"),
        (
            V2,
            {"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": 1, "attn_factor": 2}},
            "deepseek2 computes with 1",
        ),
        (V3, {"attention_bias": True}, "true is not supported by deepseek2"),
        (V3, {"rope_interleave": False}, "expected true .RoPE pairs neighbouring channels., found false"),
        (V3, {"num_key_value_heads": 2}, "expected 4 .one per query head., found 2: latent attention"),
        (V3, {"qk_rope_head_dim": 7}, "'qk_rope_head_dim': expected an even number of channels, found 7"),
        (KIMI, {"qk_rope_head_dim": 7}, "'qk_rope_head_dim': expected an even number of channels, found 7"),
        (V3, {"kv_lora_rank": 10**9}, "expected a whole number of 1 to 4096, found 1000000000"),
        (V3, {"n_group": 3}, "3 does not divide 4 experts into groups of 2"),
        (V3, {"n_group": 4}, "4 does not divide 4 experts into groups of 2"),
        (V3, {"topk_group": 3}, "expected a whole number of 1 to 2, found 3"),
        (V3, {"num_experts_per_tok": 3}, "1 with 2 experts per group is too few to choose 3"),
        (V3, {"num_hidden_layers": 1}, "not a tensor of deepseek2, nor"),
        (V3, {"rope_scaling": YARN | {"beta_slow": 0}}, "'beta_slow': expected 0.001 to 1e.06, found 0"),
        (V3, {"rope_scaling": YARN, "rope_theta": 1}, "'rope_theta': expected more than 1 with yarn, found 1"),
        (V3, {"v_head_dim": 8}, r"kv_b_proj.weight': expected shape \[128, 32\], found \[256, 32\]"),
        (GLM, {"mlp_layer_types": ["sparse", "dense"]}, "expected 2 entries: dense ones first, then sparse ones"),
        (GLM, {"num_nextn_predict_layers": 2}, "layers.3.input_layernorm.weight': missing"),
        (MISTRAL4, {"n_routed_experts": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        (MISTRAL4, {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "'original_max.*': missing"),
        (KIMI, {"linear_attn_config": {"head_dim": 16, "num_heads": 2}}, "expected 4 as in attention, found 2"),
        (KIMI, {"linear_attn_config": {"head_dim": 24, "num_heads": 4}}, "expected a multiple of 16, found 24"),
        (KIMI, {"linear_attn_config": None, "linear_head_dim": None}, "'num_heads': missing"),
        (KIMI, {"moe_router_activation_func": "softmax"}, "expected sigmoid, found 'softmax'"),
        (KIMI, {"mla_use_nope": False}, "false is not supported by kimi-linear"),
    ],
)
def test_what_no_key_can_say(case: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        model_of(case, tmp_path, **change)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        *[([number], "expected layer numbers from 1 to 2") for number in (0, 3, "2", 2.0)],
        ([2] * 3, "expected at most 2 layer numbers, found 3"),
    ],
)
def test_numbers_of_kimi_s_attention_layers_count_from_one(listed: list[Any], message: str, tmp_path: Path) -> None:
    config, _ = checkpoint(KIMI)
    said = config["linear_attn_config"] | {"full_attn_layers": listed}
    with pytest.raises(ModelFileError, match=f"'full_attn_layers': {message}"):
        model_of(KIMI, tmp_path, linear_attn_config=said)
