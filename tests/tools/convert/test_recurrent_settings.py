"""Tests of configurations of LFM2, Falcon H1, Granite 4.0 H, Nemotron H, Llama 4 and Qwen 3 VL: older names of
settings, and unsupported settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.architectures import build_program
from llamaclust.model.loader import Model
from llamaclust.model.model_keys import read_hyperparameters
from llamaclust.model.quant_types import QuantType
from support.models.converted import converted, converted_checkpoint
from support.models.original_models import SEED, Shapes, draw, recorded_form

_LIMIT = "time_step_limit"


def changed(config: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration with changed settings of the text model; None removes one."""
    inner = config.get("text_config", config)
    found = {name: value for name, value in {**inner, **change}.items() if value is not None}
    return config | {"text_config": found} if inner is not config else found


def with_backbone(shapes: Shapes) -> Shapes:
    return {name.replace("model.", "backbone.", 1): shape for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lfm2", {"layer_types": None, "full_attn_idxs": [1, 3]}),
        ("lfm2", {"intermediate_size": None, "block_ff_dim": 96}),
        ("lfm2-plain", {"tie_word_embeddings": None, "tie_embedding": False}),
        ("falcon-h1", {"mamba_d_head": "auto"}),
        ("falcon-h1", {_LIMIT: None}),
        ("granitehybrid", {"layer_types": None, "layers_block_type": ["mamba", "attention", "mamba"]}),
        ("granitehybrid", {"position_embedding_type": "nope"}),
        ("nemotron_h", {"layers_block_type": None, "layer_types": None, "hybrid_override_pattern": "M-*M-"}),
        ("nemotron_h_moe", {"layers_block_type": ["mamba", "moe", "attention", "moe"], "layer_types": None}),
        ("nemotron_h", {"num_hidden_layers": 5, "head_dim": None, "attention_head_dim": 32}),
        ("llama4", {"moe_layers": None, "no_rope_layers": [], "layer_types": None}),
        ("llama4", {"attn_temperature_tuning": 4}),
        ("llama4-plain", {"interleave_moe_layer_step": 1, "moe_layers": [1, 3]}),
    ],
)
def test_older_names_of_settings_say_the_same(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    config, shapes = recorded_form(name)
    models: list[Model] = []
    for folder, said in (("new", config), ("old", changed(config, change))):
        (tmp_path / folder).mkdir()
        models.append(converted(tmp_path / folder, said, shapes, SEED))
    plain = [
        {
            key: str(value)
            for key, value in model.file.metadata.items()
            if not key.startswith(("tokenizer.", "general.name"))
        }
        for model in models
    ]
    assert plain[0] == plain[1] and models[0].file.tensors.keys() == models[1].file.tensors.keys()


def test_experts_of_qwen_3_vl_are_read_in_the_published_form_too(tmp_path: Path) -> None:
    """Checks experts with columns before rows, which transformers transposes when it reads but not when it writes."""
    config, shapes = recorded_form("qwen3vlmoe")
    tensors = {tensor: draw(tensor, shape, SEED) for tensor, shape in shapes.items()}
    turned = {name: array.swapaxes(1, 2).copy() if ".experts." in name else array for name, array in tensors.items()}
    (tmp_path / "turned").mkdir()
    plain, other = (
        converted_checkpoint(tmp_path, config, tensors),
        converted_checkpoint(tmp_path / "turned", config, turned),
    )
    assert plain.tensors.keys() == other.tensors.keys()
    assert all(plain.tensor(name).read() == other.tensor(name).read() for name in plain.tensors)


@pytest.mark.parametrize("name", ["lfm2moe", "falcon-h1-norm", "granitehybrid-experts", "nemotron_h_moe-latent"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_what_states_are_computed_with_stays_float32(name: str, kind: str, tmp_path: Path) -> None:
    config, shapes = recorded_form(name)
    tensors = {tensor: draw(tensor, shape, SEED) for tensor, shape in shapes.items()}
    model = converted_checkpoint(tmp_path, config, tensors, kind)
    exact = re.compile(
        r".*\.(ssm_(conv1d|norm)\.weight|ssm_[ad]|ssm_dt\.bias|shortconv\.conv\.weight|ffn_gate_inp\.weight)"
    )
    found = [tensor for tensor in model.tensors if exact.fullmatch(tensor)]
    assert found and all(model.tensor(tensor).quant_type is QuantType.F32 for tensor in found)
    assert build_program(model, 0, read_hyperparameters(model).block_count)


def test_llama_cpp_finds_what_it_asks_for(tmp_path: Path) -> None:
    """Checks llama.cpp's names: a norm of Falcon H1 without suffix, a second key for Nemotron H's epsilon."""
    models: dict[str, Model] = {}
    for name in ("falcon-h1", "nemotron_h"):
        (tmp_path / name).mkdir()
        models[name] = converted(tmp_path / name, *recorded_form(name), SEED)
    assert {"blk.0.ffn_norm", "blk.2.ffn_norm"} <= models["falcon-h1"].file.tensors.keys()
    keys = models["nemotron_h"].file.metadata
    assert keys["nemotron_h.attention.layer_norm_epsilon"] == keys["nemotron_h.attention.layer_norm_rms_epsilon"]


def test_layers_that_predict_further_tokens_are_left_out_of_nemotron_with_a_note(tmp_path: Path) -> None:
    config, shapes = recorded_form("nemotron_h_moe")
    plain = converted(tmp_path, config, shapes, SEED).file.tensors
    more = {**with_backbone(shapes), "mtp.layers.0.eh_proj.weight": (64, 128)}
    (tmp_path / "more").mkdir()
    assert converted(tmp_path / "more", config, more, SEED).file.tensors.keys() == plain.keys()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lfm2", {"layer_types": ["conv"]}, "expected 4 entries, one for each layer, found 1"),
        ("lfm2", {"layer_types": ["conv", "mamba", "conv", 5]}, "expected a list of conv, full_attention"),
        ("lfm2", {"layer_types": None, "full_attn_idxs": [9]}, "'full_attn_idxs': expected layer numbers from 0 to 3"),
        (
            "lfm2",
            {"layer_types": None, "full_attn_idxs": [1] * 5},
            "'full_attn_idxs': expected at most 4 layer numbers, found 5",
        ),
        ("lfm2", {"conv_L_cache": 17}, "expected a whole number of 2 to 16, found 17"),
        ("lfm2", {"conv_bias": True}, "'conv_bias': true is not supported by lfm2"),
        ("lfm2", {"block_ffn_dim_multiplier": 1e9}, "expected 0.001 to 1000, found 1000000000.0"),
        ("lfm2moe", {"use_expert_bias": False}, "false is not supported by lfm2moe"),
        ("lfm2moe", {"routed_scaling_factor": 2.0}, "lfm2moe supports only 1"),
        ("lfm2moe", {"num_dense_layers": 4}, "expert_bias|not a tensor of lfm2moe|missing"),
        ("falcon-h1", {"mamba_n_heads": 7}, "7 heads of 16 channels do not add up to the block's 96"),
        ("falcon-h1", {"mamba_n_groups": 4}, "4 groups do not divide 6 heads"),
        ("falcon-h1", {"ssm_multipliers": [1.0]}, "expected 5 numbers, found 1 entries"),
        ("falcon-h1", {"mlp_multipliers": [1.0, float("nan")]}, "expected positive numbers only"),
        ("falcon-h1", {"key_multiplier": float("inf")}, "expected 1e-09 to 1e.06, found inf"),
        ("falcon-h1", {_LIMIT: [0.0, 0.1]}, "is not supported; expected 0 to infinity"),
        ("falcon-h1", {_LIMIT: "a\nb\x1b[2J"}, r"'time_step_limit': 'a\\nb\\x1b\[2J' is not supported; expected 0"),
        ("falcon-h1", {_LIMIT: 5}, "5 is not supported; expected 0 to infinity"),
        ("falcon-h1-norm", {"mamba_norm_before_gate": True}, "its norm is after the gate"),
        ("falcon-h1", {"projectors_bias": True}, "true is not supported by falcon-h1"),
        ("granitehybrid", {"mamba_d_conv": 1}, "expected a whole number of 2 to 16, found 1"),
        ("granitehybrid", {"mamba_expand": 3}, "do not add up to the block's 192"),
        ("granitehybrid", {"position_embedding_type": "alibi"}, "'alibi' is not known; known: rope, nope"),
        ("granitehybrid", {"layer_types": None}, "'layers_block_type': expected a list of mamba, linear_attention"),
        ("nemotron_h", {"layers_block_type": ["mlp", "moe", "mlp", "mlp", "mlp"]}, "both mlp and moe layers"),
        ("nemotron_h", {"num_hidden_layers": 4}, "expected 4 entries, one for each layer, found 5"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "'silu' is not supported; expected relu2"),
        (
            "nemotron_h",
            {"mamba_head_dim": 1, "n_groups": None},
            r"'mamba_d_head': expected multiples of 16, found \d+ and \d+ channels of the convolution",
        ),
        ("nemotron_h", {"mamba_head_dim": 1 << 20}, "'mamba_d_state': .* exceed the limit of 67108864"),
        ("nemotron_h", {"mamba_head_dim": None}, "'mamba_d_head': missing"),
        ("nemotron_h_moe", {"n_routed_experts": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        ("nemotron_h_moe", {"num_experts_per_tok": 7}, "expected a whole number of 1 to 6, found 7"),
        ("llama4", {"use_qk_norm": False}, "false is not supported for 6 experts: Q and K have norms"),
        ("llama4", {"attn_temperature_tuning": False}, "false is not supported by llama4"),
        ("llama4", {"floor_scale": 4096}, "4096 is not supported; llama4 computes with 8192"),
        ("llama4", {"moe_layers": [0, 1, 3]}, "expected experts in every n-th layer"),
        (
            "llama4",
            {"moe_layers": "a\nb"},
            r"'moe_layers': expected experts in every n-th layer, found 'a\\nb'",
        ),
        ("llama4", {"no_rope_layers": [1, 1]}, "expected 5 numbers, 0 or 1"),
        ("llama4", {"no_rope_layers": 7}, "expected 5 numbers, 0 or 1"),
        ("llama4", {"no_rope_layers": [1] * 5}, "expected chunked_attention in exactly the layers with RoPE"),
        ("llama4", {"attention_chunk_size": -1}, "expected a whole number of 1 to .*, found -1"),
        ("qwen3vl", {"rope_parameters": {"mrope_section": [6, 5]}}, "expected 3 or 4 numbers, found 2"),
        ("qwen3vl", {"rope_parameters": {"mrope_section": [16, 5, 5]}}, "exceeds 16"),
        ("qwen3vlmoe", {"mlp_only_layers": [1]}, "layers without experts among layers with experts"),
        ("qwen3vlmoe", {"norm_topk_prob": False}, "false is not supported by qwen3vlmoe"),
    ],
)
def test_settings_that_no_file_can_say(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, shapes = recorded_form(name)
    with pytest.raises(ModelFileError, match=message):
        converted(tmp_path, changed(config, change), shapes, SEED)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["falcon-h1", "kimi-linear", "qwen3next"])
def test_decays_that_no_float32_holds(name: str, tmp_path: Path) -> None:
    config, shapes = recorded_form(name)
    tensors = {tensor: draw(tensor, shape, SEED) for tensor, shape in shapes.items()}
    named = next(tensor for tensor in sorted(tensors) if tensor.endswith(".A_log"))
    for value, is_possible in ((88.0, True), (200.0, False)):
        tensors[named].reshape(-1)[-1] = value
        (folder := tmp_path / str(value)).mkdir()
        if is_possible:
            assert converted_checkpoint(folder, config, tensors)
            continue
        with pytest.raises(ModelFileError, match=r"A_log.*: the logarithm of a decay is 200; the limit is 88"):
            converted_checkpoint(folder, config, tensors)
        assert not list(folder.glob("*.gguf"))


@pytest.mark.filterwarnings("error")
def test_multiplied_weights_that_no_float32_holds(tmp_path: Path) -> None:
    config, shapes = recorded_form("falcon-h1")
    tensors = {tensor: draw(tensor, shape, SEED) for tensor, shape in shapes.items()}
    tensors["model.embed_tokens.weight"][0, 0] = 3e37
    said = changed(config, {"embedding_multiplier": 1e6})
    with pytest.raises(ModelFileError, match=r"embed_tokens.*: weights of up to 3e.37 times 1e.06 do not fit float32"):
        converted_checkpoint(tmp_path, said, tensors)
    assert not list(tmp_path.glob("*.gguf"))
