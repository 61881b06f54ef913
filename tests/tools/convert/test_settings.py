"""Checks that invalid settings of a checkpoint, and those without a GGUF key, are refused with one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.tools.convert.formats.hugging_face import read_folder
from llamaclust.tools.convert.formats.source_files import SourceFiles
from support.models.checkpoint_files import write_hugging_face
from support.models.converted import converted_checkpoint as converted
from support.models.random_checkpoints import checkpoint

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"type": "longrope", "factor": 2.0, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
_LLAMA3 = {"rope_type": "llama3", "original_max_position_embeddings": 64}

_QWEN35 = "Qwen3_5ForCausalLM"
_GEMMA4 = "Gemma4ForCausalLM experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "a" * 9999}}, r"'a{61}\.\.\.' is not known"),
        ({"rope_scaling": {"type": "magic"}}, "'magic' is not known"),
        ({"num_hidden_layers": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        ({"hidden_size": -1}, "expected a whole number .*, found -1"),
        ({"hidden_size": None}, "'hidden_size': missing"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "5 does not divide a width of 64"),
        ({"num_key_value_heads": 3}, "3 does not divide 4 heads"),
        ({"intermediate_size": 128}, r"expected shape \[128, 64\], found \[96, 64\]"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight': missing"),
        ({"num_hidden_layers": 1}, "not a tensor of llama, nor are 8 others"),
        ({"architectures": ["LlamaForCausalM"]}, "did you mean LlamaForCausalLM"),
        ({"architectures": ["Nobody"]}, r"'Nobody' cannot be converted; \d+ architectures can: docs/models.md$"),
        ({"architectures": None}, "'architectures': missing"),
        ({"rms_norm_eps": "small"}, "expected a number, found 'small'"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, tensors = checkpoint("LlamaForCausalLM")
    with pytest.raises(ModelFileError, match=message):
        converted(tmp_path, config | change, tensors)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my-finetune", "my-finetune"), ("models--some--tiny-llama/snapshots/0123456789abcdef", "tiny-llama")],
)
def test_the_default_name_is_the_folders(folder: str, name: str, tmp_path: Path) -> None:
    """transformers writes the name of the model that was loaded to `_name_or_path`, also for a changed model."""
    config, tensors = checkpoint("LlamaForCausalLM")
    write_hugging_face(tmp_path / folder, {**config, "_name_or_path": "some/llama"}, tensors)
    with SourceFiles() as files:
        assert read_folder(files, tmp_path / folder).name == name


_STRETCHED = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}

_TWO_BASES = {"full_attention": {"rope_theta": 20000.0}, "sliding_attention": {"rope_theta": 3000.0}}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "'hidden_act': 'gelu' is not supported; expected silu"),
        (
            "LlamaForCausalLM",
            {"rope_scaling": _LONG | {"original_max_position_embeddings": 1}},
            "'original_max_position_embeddings': expected a whole number of 2 to .*, found 1",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": _LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.5}},
            "'low_freq_factor': expected at most the high_freq_factor of 1.5, found 4",
        ),
        ("Starcoder2ForCausalLM", {"hidden_act": "silu"}, "'silu' is not supported; expected gelu_pytorch_tanh"),
        ("LlamaForCausalLM", {"rope_scaling": _YARN | {"truncate": 0}}, "'truncate': expected true or false, found 0"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "false is not supported by qwen3moe"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 24}, "expected 16 for 2 layers, found 24"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "null is not supported by gemma2"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "gemma3 does not cap attention scores"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "true is not supported"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "expected 2 entries, each .* found 1: "),
        (
            "Gemma3ForCausalLM",
            {"layer_types": ["full_attention", "no"]},
            r"expected 2 entries, each sliding_attention or full_attention, found 2: \['full_attention', 'no'\]",
        ),
        ("GptOssForCausalLM", {"swiglu_limit": 6.0}, "'swiglu_limit': 6.0 is not supported; gpt-oss computes with 7.0"),
        ("GptOssForCausalLM", {"sliding_window": None}, "'sliding_window': missing"),
        ("GptOssForCausalLM", {"num_local_experts": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        ("GptOssForCausalLM", {"num_experts_per_tok": 5}, "expected a whole number of 1 to 4, found 5"),
        ("Glm4MoeForCausalLM", {"n_group": 2}, "2 is not supported; expected one group of experts"),
        ("Glm4MoeForCausalLM", {"n_routed_experts": None}, "'n_routed_experts': missing"),
        (
            "Glm4MoeForCausalLM",
            {"partial_rotary_factor": 0},
            "expected an even number of 2 or more channels, found 0 .0 of 16.",
        ),
        (
            "Glm4MoeForCausalLM",
            {"partial_rotary_factor": 1e-9},
            "an even number of 2 or more channels, found 0 .1e-09 of 16.",
        ),
        (
            "Glm4MoeForCausalLM",
            {"partial_rotary_factor": 0.33},
            "an even number of 2 or more channels, found 5 .0.33 of 16.",
        ),
        (_GEMMA4, {"final_logit_softcapping": 1e9}, r"expected 0 to 1e\+06, found 1000000000.0"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 1e9}, r"expected 0.001 to 1e\+06, found 1000000000.0"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 1e9}, r"expected 0.001 to 1e\+06, found 1000000000.0"),
        (
            "Glm4MoeForCausalLM",
            {"num_nextn_predict_layers": 10**9},
            "expected a whole number of 0 to 1024, found 1000000000",
        ),
        ("Glm4MoeForCausalLM", {"num_nextn_predict_layers": 2}, "layers.3.input_layernorm.weight': missing"),
        ("Glm4MoeForCausalLM", {"num_nextn_predict_layers": 0}, "not a tensor of glm4moe, nor"),
        ("Glm4MoeForCausalLM", {"first_k_dense_replace": -1}, "expected a whole number of 0 to 1024, found -1"),
        (
            _GEMMA4,
            {"per_layer_config": {"1": {"head_dim": 10**9}}},
            "expected a whole number of 1 to 4096, found 1000000000",
        ),
        (_GEMMA4, {"per_layer_config": {"1": 5}}, "expected an object, found 5"),
        (_GEMMA4, {"per_layer_config": [1]}, "expected an object"),
        (_GEMMA4, {"per_layer_config": {"0": {"head_dim": 32}}}, r"k_norm.weight': shape|q_proj.weight': shape|differ"),
        (_GEMMA4, {"global_head_dim": None}, r"expected shape \[2048, 64\], found \[128, 64\]"),
        (_GEMMA4, {"num_global_key_value_heads": 3}, "3 does not divide 4 heads"),
        (_GEMMA4, {"use_bidirectional_attention": "all"}, "only null and vision"),
        (_GEMMA4, {"hidden_activation": "silu"}, "'silu' is not supported; expected gelu_pytorch_tanh"),
        (_GEMMA4, {"num_kv_shared_layers": 2}, "expected a whole number of 0 to 1, found 2"),
        (_GEMMA4, {"num_kv_shared_layers": 1}, "1 is too large: each shared layer needs an unshared layer"),
        (_GEMMA4, {"top_k_experts": 5}, "expected a whole number of 1 to 4, found 5"),
        (_GEMMA4, {"num_experts": 10**12}, "expected a whole number of 1 to 1024, found 1000000000000"),
        (
            _GEMMA4,
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "in both cases with factor 1, found 'yarn'",
        ),
        (_GEMMA4, {"rope_parameters": {"full_attention": {"factor": 2.0}}}, "found 'proportional', factor 2.0"),
        (
            _GEMMA4,
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial rotation in layers with a sliding window",
        ),
        ("Gemma3nForCausalLM", {"altup_correct_scale": False}, "false is not supported by gemma3n"),
        ("Gemma3nForCausalLM", {"altup_num_inputs": 1}, "expected a whole number of 2 to 16, found 1"),
        ("Gemma3nForCausalLM", {"altup_active_idx": 3}, "expected a whole number of 0 to 2, found 3"),
        ("Gemma3nForCausalLM", {"activation_sparsity_pattern": [0.5, 1.0]}, "expected shares from 0 to below 1"),
        ("Gemma3nForCausalLM", {"activation_sparsity_pattern": [0.5]}, "expected a list of 2 shares"),
        ("Gemma3nForCausalLM", {"intermediate_size": [96, 0]}, r"2 widths of 1 to 1048576, found 2: \[96, 0\]"),
        ("Gemma3nForCausalLM", {"num_kv_shared_layers": 2}, "expected a whole number of 0 to 1, found 2"),
        (
            "Gemma4ForCausalLM inputs",
            {"vocab_size_per_layer_input": 300},
            "expected 320 as in the vocabulary, found 300",
        ),
        ("Gemma4ForCausalLM inputs", {"hidden_size_per_layer_input": 10**9}, "a whole number of 0 to 4096"),
        (_QWEN35, {"linear_num_key_heads": 3}, "3 does not divide 4 value heads"),
        (_QWEN35, {"linear_num_key_heads": 5}, "expected a whole number of 1 to 4, found 5"),
        (_QWEN35, {"linear_num_value_heads": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        (_QWEN35, {"linear_key_head_dim": None}, "'linear_key_head_dim': missing"),
        (_QWEN35, {"linear_value_head_dim": 32}, "expected 16, the width of keys, found 32"),
        (_QWEN35, {"linear_conv_kernel_dim": 1}, "expected a whole number of 2 to 16, found 1"),
        (_QWEN35, {"linear_conv_kernel_dim": 17}, "expected a whole number of 2 to 16, found 17"),
        (_QWEN35, {"linear_key_head_dim": 272}, "expected a whole number of 1 to 256, found 272"),
        (_QWEN35, {"linear_key_head_dim": 24}, "expected a multiple of 16, found 24"),
        (
            _QWEN35,
            {"layer_types": ["full_attention"]},
            "expected 2 entries, each linear_attention or full_attention, found 1: ",
        ),
        (_QWEN35, {"layer_types": None, "full_attention_interval": 0}, "expected a whole number of 1 to 1024, found 0"),
        (_QWEN35, {"mtp_num_hidden_layers": 2}, "'mtp.layers.1.input_layernorm.weight': missing"),
        (_QWEN35, {"rope_parameters": {"mrope_section": [99]}}, "expected whole numbers from 0 to 2"),
        (_QWEN35, {"rope_parameters": {"mrope_section": [2, 1, 0]}}, r"the sum of \[2, 1, 0\] exceeds 2 "),
        (_QWEN35, {"rope_parameters": {"mrope_section": [0] * 5}}, "expected 3 or 4 numbers, found 5"),
        (_QWEN35, {"rope_parameters": {"mrope_section": [1]}}, "expected 3 or 4 numbers, found 1"),
        ("Qwen3NextForCausalLM", {"norm_topk_prob": False}, "false is not supported by qwen3next"),
        ("Qwen3NextForCausalLM", {"mlp_only_layers": [0]}, "layers without experts among layers with experts"),
        ("Qwen3_5MoeForCausalLM", {"num_experts": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        ("SeedOssForCausalLM", {"mlp_bias": True}, "true is not supported by seed_oss"),
        ("Ernie4_5ForCausalLM", {"use_bias": True}, "true is not supported by ernie4_5"),
        ("GraniteForCausalLM", {"residual_multiplier": 1e300}, "expected 1e-06 to 1e.06, found 1e.300"),
        ("GraniteForCausalLM", {"mlp_bias": True}, "true is not supported by granite"),
        ("Exaone4ForCausalLM", {"sliding_window": -1}, "expected a whole number of 1 to .*, found -1"),
        ("GraniteMoeSharedForCausalLM", {"num_experts_per_tok": 5}, "expected a whole number of 1 to 4, found 5"),
        (
            "GraniteMoeSharedForCausalLM",
            {"num_local_experts": 10**9},
            "expected a whole number of 1 to 1024, found 1000000000",
        ),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_end_index": 0}, "0 is not supported; expected 1, the last layer"),
        ("Ernie4_5_MoeForCausalLM", {"moe_layer_interval": 0}, "expected a whole number of 1 to 1024, found 0"),
        ("Ernie4_5_MoeForCausalLM", {"moe_k": None}, "'moe_k': missing"),
        ("Cohere2ForCausalLM", {"logit_scale": None}, "'logit_scale': missing"),
        ("Cohere2ForCausalLM", {"rotary_pct": 0.5}, "0.5 is not supported; expected 1"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "expected RoPE in all layers except every 4th"),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layers": "all"},
            "'no_rope_layers': expected RoPE in all layers except every 4th",
        ),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layers": None, "no_rope_layer_interval": 10**30},
            "a whole number of 1 to 1024",
        ),
        ("SmolLM3ForCausalLM", {"use_sliding_window": True}, "true is not supported"),
        ("Ministral3ForCausalLM", {"sliding_window": 64}, "64 for a context of 256: mistral3 has no window"),
        ("Ministral3ForCausalLM", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "'original_max.*': missing"),
        (
            "Ministral3ForCausalLM",
            {"rope_parameters": {"llama_4_scaling_beta": 1e30}},
            "expected 0 to 1000, found 1e.30",
        ),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "8.0 is not supported: olmo2 does not clip"),
        (
            "Olmo3ForCausalLM",
            {"rope_parameters": _TWO_BASES},
            "expected one base, found 3000 for layers with a window and 20000.0 for others",
        ),
        ("Olmo3ForCausalLM", {"sliding_window": None}, "'sliding_window': missing"),
        ("Olmo3ForCausalLM", {"layer_types": [{}, {}]}, "each sliding_attention or full_attention, found 2: "),
        ("Gemma3ForCausalLM", {"rope_parameters": _STRETCHED}, "RoPE scaling in layers with a sliding window"),
        ("FalconForCausalLM", {"new_decoder_architecture": False, "parallel_attn": False}, "'parallel_attn': false"),
        (
            "GPT2LMHeadModel",
            {"scale_attn_by_inverse_layer_idx": True},
            "expected true, and false for scale_attn_by_inverse_layer_idx",
        ),
    ],
)
def test_settings_that_no_key_can_say(case: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, tensors = checkpoint(case)
    with pytest.raises(ModelFileError, match=message):
        converted(tmp_path, config | change, tensors)


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        (
            "Mistral3ForConditionalGeneration",
            {"model_type": "mistral5"},
            "'mistral5' in a Mistral3For.* supported: ministral3, mistral, mistral4",
        ),
        ("Gemma4ForConditionalGeneration", {"model_type": 7}, "expected text, found 7"),
        ("Gemma4ForConditionalGeneration", {}, "'num_hidden_layers': missing"),
    ],
)
def test_text_parts_that_are_not_known(family: str, said: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, tensors = checkpoint("LlamaForCausalLM")
    with pytest.raises(ModelFileError, match=message):
        converted(tmp_path, {"architectures": [family], "text_config": said}, tensors)


def test_two_tensors_that_become_one_are_refused(tmp_path: Path) -> None:
    """Checks a text model under both of the names that multimodal checkpoints use."""
    config, tensors = checkpoint("Gemma3ForCausalLM")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    name = "model.norm.weight"
    inner = f"language_model.{name}"
    with pytest.raises(ModelFileError, match=f"tensors '{name}' and '{inner}' both stand for '{name}'"):
        converted(tmp_path, whole, {**tensors, inner: tensors[name]})
