"""Tests of every architecture's converter: names in gguf-py's table, shapes, and the place of each number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.architectures import ARCHITECTURES, build_program
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.architectures.tensors import nextn_tensors
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.program import Rope
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.stream import encoded
from support.models.checkpoint_files import stored_as
from support.models.checkpoints.shapes import HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS
from support.models.converted import converted_checkpoint as converted
from support.models.random_checkpoints import CASES, checkpoint

Arrays = Mapping[str, NDArray[Any]]
_TABLES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
_PREDICTIONS = tuple(kind for kind in gguf.MODEL_TENSOR if kind.name.startswith("NEXTN"))
"""Tensors of MTP heads, which some architectures' tables lack."""
_PREDICTION_TABLE = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, LAYERS + 1)
_PACKED = (
    "W_pack",
    "wqkv",
    "in_proj_qkvz",
    "conv1d",
    "mtp.fc",
    "mtp.pre_fc",
    "mtp.norm",
    "mtp_linear",
    "input_linear",
    ".experts.",
    "router.scale",
    "router.per_expert_scale",
    "kv_b_proj",
    "self_attn.A_log",
    "altup_projections.",
    "altup_unembed_projections.",
)
"""Tensors that are split, merged with others, or belong to another tensor."""


def read(model: ModelFile, name: str) -> NDArray[np.float32]:
    tensor = model.tensor(name)
    return dequantize(tensor.quant_type, tensor.read(), int(np.prod(tensor.shape))).reshape(tensor.shape)


def in_pairs(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Puts channel i of a head's first half beside channel i of its second one."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weights.shape)


_OTHER_NAMES = (
    ("e_score_correction_bias", "e_score_correction.bias"),
    (".dt_bias", ".dt_proj.bias"),
    (".expert_bias", ".expert_bias.bias"),
    ("mtp.layers.0.", f"model.layers.{LAYERS}."),
)


def as_in_table(name: str) -> str:
    """Returns the name under which llama.cpp's conversion looks up a tensor."""
    for ours, theirs in _OTHER_NAMES:
        name = name.replace(ours, theirs)
    return f"{name}.weight" if name.endswith((".sinks", ".layer_scalar", ".correct_output_scale")) else name


def named(table: gguf.TensorNameMap, name: str) -> str | None:
    """Returns GGUF's name; some architectures' tables lack the names of MTP heads."""
    found = table.get_name(name, (".weight", ".bias"))
    if found is None and f"layers.{LAYERS}." in name:
        return _PREDICTION_TABLE.get_name(name, (".weight", ".bias"))
    return found


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_gguf_s_own_table(case: str, tmp_path: Path) -> None:
    config, tensors = checkpoint(case)
    model = converted(tmp_path, config, tensors)
    arch = _TABLES[model.metadata_str("general.architecture")]
    table = gguf.get_tensor_name_map(arch, LAYERS + 1)
    known = {
        name: as_in_table(name.removeprefix("transformer.") if case == "ChatGLMModel" else name) for name in tensors
    }
    mapped = {name: named(table, said) for name, said in known.items()}
    plain = {name: new for name, new in mapped.items() if not any(part in name for part in _PACKED)}
    assert None not in plain.values(), plain
    others = {name for name in model.tensors if name not in plain.values()}
    assert len({*plain.values()}) == len(plain) and len(model.tensors) == len(plain) + len(others)
    stems = {gguf.TENSOR_NAMES[kind] for kind in (*gguf.MODEL_TENSORS[arch], *_PREDICTIONS)}
    for name in others:
        parts = re.sub(r"\.(weight|bias|scale)$", "", name).split(".")
        assert ".".join("{bid}" if part.isdecimal() else part for part in parts) in stems, name
    for name, new in plain.items():
        shape = tensors[name].shape
        exchanged = case.startswith("GPT2") and ".c_" in name and len(shape) == 2
        wanted = shape[::-1] if exchanged else shape if shape[0] != 1 or len(shape) == 1 else shape[1:]
        assert model.tensor(str(new)).shape == wanted, name


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_run_here_finds_all_it_needs(case: str, tmp_path: Path) -> None:
    """Checks that programs are built, which checks all tensors and keys, and that hardly any tensor remains unused."""
    config, tensors = checkpoint(case)
    model = converted(tmp_path, config, tensors)
    name = model.metadata_str("general.architecture")
    if name not in ARCHITECTURES or name == "baichuan":  # only the layers of its 7B and 13B models are known
        pytest.skip(f"{name} of {LAYERS} layers cannot be run")
    program = build_program(model, 0, LAYERS)
    further = {*nextn_tensors(model)}
    predicts = case.startswith(("Glm4Moe", "Qwen3Next", "Qwen3_5"))
    assert predicts == (len(further) > 10)
    assert {*program.weights} <= model.tensors.keys() - further
    assert len(program.weights) >= len(model.tensors) - len(further) - 3


def test_llama_s_rows_are_in_pairs_and_nothing_else_moves(tmp_path: Path) -> None:
    config, tensors = checkpoint("LlamaForCausalLM")
    model = converted(tmp_path, config, tensors)
    source = "model.layers.1.self_attn"
    np.testing.assert_array_equal(
        read(model, "blk.1.attn_q.weight"), in_pairs(tensors[f"{source}.q_proj.weight"], HEADS)
    )
    key = in_pairs(tensors[f"{source}.k_proj.weight"], KV_HEADS)
    np.testing.assert_array_equal(read(model, "blk.1.attn_k.weight"), key)
    np.testing.assert_array_equal(read(model, "blk.1.attn_v.weight"), tensors[f"{source}.v_proj.weight"])
    np.testing.assert_array_equal(read(model, "blk.0.ffn_down.weight"), tensors["model.layers.0.mlp.down_proj.weight"])
    assert model.metadata["llama.rope.dimension_count"] == HEAD and model.metadata["llama.block_count"] == LAYERS


def test_packed_matrices_are_taken_apart(tmp_path: Path) -> None:
    config, tensors = checkpoint("BaichuanForCausalLM")
    query, key, value = np.split(tensors["model.layers.0.self_attn.W_pack.weight"], 3)
    model = converted(tmp_path / "baichuan", config, tensors)
    np.testing.assert_array_equal(read(model, "blk.0.attn_q.weight"), in_pairs(query, HEADS))
    np.testing.assert_array_equal(read(model, "blk.0.attn_k.weight"), in_pairs(key, HEADS))
    np.testing.assert_array_equal(read(model, "blk.0.attn_v.weight"), value)

    config, tensors = checkpoint("InternLM2ForCausalLM")
    groups = tensors["model.layers.0.attention.wqkv.weight"].reshape(KV_HEADS, HEADS // KV_HEADS + 2, HEAD, HIDDEN)
    model = converted(tmp_path / "internlm2", config, tensors)
    wanted = in_pairs(groups[:, :-2].reshape(-1, HIDDEN), HEADS)
    np.testing.assert_array_equal(read(model, "blk.0.attn_q.weight"), wanted)
    np.testing.assert_array_equal(
        read(model, "blk.0.attn_k.weight"), in_pairs(groups[:, -2].reshape(-1, HIDDEN), KV_HEADS)
    )
    np.testing.assert_array_equal(read(model, "blk.0.attn_v.weight"), groups[:, -1].reshape(-1, HIDDEN))

    config, tensors = checkpoint("FalconForCausalLM")
    groups = tensors["transformer.h.0.self_attention.query_key_value.weight"].reshape(groups.shape)
    model = converted(tmp_path / "falcon", config, tensors)
    parts = [part.reshape(-1, HIDDEN) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])]
    np.testing.assert_array_equal(read(model, "blk.0.attn_qkv.weight"), np.concatenate(parts))


def test_experts_that_are_stored_differently_are_stacked_as_float32(tmp_path: Path) -> None:
    """Checks experts of several types, as in checkpoints of eight bits or with adapters."""
    config, tensors = checkpoint("MixtralForCausalLM")
    names = [f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight" for number in range(4)]
    mixed = {name: values.astype(np.float16) if name == names[0] else values for name, values in tensors.items()}
    model = converted(tmp_path, config, mixed)
    wanted = np.stack([mixed[name].astype(np.float32) for name in names])
    np.testing.assert_array_equal(read(model, "blk.1.ffn_down_exps.weight"), wanted)


def test_experts_are_stacked_norms_of_gemma_grow_and_gpt2_is_exchanged(tmp_path: Path) -> None:
    config, tensors = checkpoint("MixtralForCausalLM")
    model = converted(tmp_path / "mixtral", config, tensors)
    names = [f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight" for number in range(4)]
    np.testing.assert_array_equal(
        read(model, "blk.1.ffn_down_exps.weight"), np.stack([tensors[name] for name in names])
    )

    config, tensors = checkpoint("Gemma3ForCausalLM")
    model = converted(tmp_path / "gemma3", config, tensors, "bf16")
    for name, source in (("output_norm", "model.norm"), ("blk.0.attn_q_norm", "model.layers.0.self_attn.q_norm")):
        np.testing.assert_array_equal(read(model, f"{name}.weight"), tensors[f"{source}.weight"] + 1)

    config, tensors = checkpoint("GPT2LMHeadModel")
    model = converted(tmp_path / "gpt2", config, tensors)
    np.testing.assert_array_equal(read(model, "blk.0.ffn_up.weight"), tensors["h.0.mlp.c_fc.weight"].T)
    np.testing.assert_array_equal(read(model, "blk.0.ffn_up.bias"), tensors["h.0.mlp.c_fc.bias"])


def test_experts_in_one_matrix_are_taken_apart_and_layers_of_predictions_are_kept(tmp_path: Path) -> None:
    config, tensors = checkpoint("Qwen3_5MoeForCausalLM")
    model = converted(tmp_path, config, tensors)
    for place, source in (("blk.0", "model.layers.0"), (f"blk.{LAYERS}", "mtp.layers.0")):
        halves = np.split(tensors[f"{source}.mlp.experts.gate_up_proj"], 2, axis=1)
        for part, wanted in zip(("gate", "up"), halves, strict=True):
            np.testing.assert_array_equal(read(model, f"{place}.ffn_{part}_exps.weight"), wanted)
    for name, source in (("enorm", "mtp.pre_fc_norm_embedding"), ("shared_head_norm", "mtp.norm")):
        wanted = tensors[f"{source}.weight"] + 1
        np.testing.assert_array_equal(read(model, f"blk.{LAYERS}.nextn.{name}.weight"), wanted)
    assert model.metadata["qwen35moe.block_count"] == LAYERS + 1
    assert model.metadata["qwen35moe.nextn_predict_layers"] == 1


@pytest.mark.parametrize("form", ["language_model.model.{}", "model.language_model.{}"])
def test_of_a_model_that_sees_pictures_the_text_is_taken(form: str, tmp_path: Path) -> None:
    config, tensors = checkpoint("Gemma3ForCausalLM")
    alone = converted(tmp_path / "alone", config, tensors)
    inner = {form.format(name.removeprefix("model.")): array for name, array in tensors.items()}
    root = form.split("language_model")[0]
    pictures: dict[str, NDArray[Any]] = {
        f"{root}vision_tower.x.weight": np.ones((3, 5), np.float32),
        f"{root}multi_modal_projector.y": np.ones(4),
    }
    text = {name: value for name, value in config.items() if name != "architectures"} | {"query_pre_attn_scalar": HEAD}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    found = converted(tmp_path / "whole", whole, inner | pictures)
    numbers, wanted = ({k: v for k, v in m.metadata.items() if k.startswith("gemma3.")} for m in (found, alone))
    assert numbers == wanted and found.tensors.keys() == alone.tensors.keys()
    for name in alone.tensors:
        np.testing.assert_array_equal(read(found, name), read(alone, name), name)


def test_40_layers_of_baichuan_are_the_13b_model(tmp_path: Path) -> None:
    config, tensors = checkpoint("BaichuanForCausalLM")
    first = {name: array for name, array in tensors.items() if "layers.1." not in name}
    many = {name.replace("layers.0.", f"layers.{at}."): array for at in range(40) for name, array in first.items()}
    program = build_program(converted(tmp_path, config | {"num_hidden_layers": 40}, many), 0, 40)
    assert [step.slopes for step in program.kv_layers] == [alibi_slopes(HEADS)] * 40
    assert not any(isinstance(step, Rope) for step in program.steps)


def test_the_head_of_baichuan_2_has_rows_of_length_one(tmp_path: Path) -> None:
    from llamaclust.model.checkpoints.settings import Settings
    from llamaclust.tools.convert.converters import convert_checkpoint
    from llamaclust.tools.convert.lazy import constant
    from llamaclust.tools.convert.settings import Checkpoint

    config, tensors = checkpoint("BaichuanForCausalLM")
    words = 125696
    head = np.random.default_rng(3).standard_normal((words, HIDDEN), np.float32)
    tensors |= {"lm_head.weight": head, "model.embed_tokens.weight": head}
    lazy = {name: constant(array, name) for name, array in tensors.items()}
    settings = Settings(config | {"vocab_size": words}, "config.json")
    model = convert_checkpoint(Checkpoint("BaichuanForCausalLM", settings, lazy, tmp_path, "tiny"))
    rows = model.tensors["output.weight"].read(7, 9)
    np.testing.assert_allclose(rows, head[7:9] / np.linalg.norm(head[7:9], axis=1, keepdims=True), rtol=1e-6)
    tied = Settings(config | {"vocab_size": words, "tie_word_embeddings": True}, "config.json")
    lazy = {name: tensor for name, tensor in lazy.items() if name != "lm_head.weight"}
    with pytest.raises(ModelFileError, match=r"lm_head\.weight is missing"):
        convert_checkpoint(Checkpoint("BaichuanForCausalLM", tied, lazy, tmp_path, "tiny"))


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_every_type_becomes_every_other(stored: str, kind: str, tmp_path: Path) -> None:
    config, exact = checkpoint("LlamaForCausalLM")
    model = converted(tmp_path, config, {name: stored_as(array, stored) for name, array in exact.items()}, kind)
    found, wanted = read(model, "token_embd.weight"), exact["model.embed_tokens.weight"]
    assert model.tensor("token_embd.weight").quant_type is QuantType[kind.upper()]
    assert model.tensor("output_norm.weight").quant_type is QuantType.F32
    steps = {"f32": 2.0**-23, "f16": 2.0**-11, "bf16": 2.0**-8}
    bound = steps[stored] + steps.get(kind, 0.0) + (np.abs(wanted).max() / 254 if kind == "q8_0" else 0.0)
    assert np.abs(found - wanted).max() <= 1.01 * bound * max(1.0, float(np.abs(wanted).max()))
    if stored == kind:
        np.testing.assert_array_equal(model.tensor("token_embd.weight").read(), stored_as(wanted, kind).tobytes())


def test_rounding_is_that_of_gguf_py() -> None:
    """Compares numbers of all magnitudes, some of them halfway between two representable ones."""
    generator = np.random.default_rng(8)
    numbers = generator.standard_normal((1000, 256), np.float32) * generator.choice(
        np.array([1e-8, 1e-5, 1, 300], np.float32), (1000, 1)
    )
    numbers[0, :32] = 0
    numbers[1] = np.arange(256) / 2
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    near = np.concatenate([halves, between, np.nextafter(between, np.float32(0)), -between])
    for kind in (QuantType.BF16, QuantType.Q8_0, QuantType.F16):
        values = numbers if kind is QuantType.Q8_0 else np.concatenate([numbers.reshape(-1), near])
        wanted = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(kind)))
        assert bytes(encoded(values, Storage.F32, kind, "x")) == wanted.tobytes(), kind
    exact = np.arange(1 << 16, dtype=np.uint16)
    assert bytes(encoded(exact, Storage.BF16, QuantType.F32, "x")) == (exact.astype(np.uint32) << 16).tobytes()
    finite = exact[exact & 0x7C00 != 0x7C00].view(np.float16)
    assert bytes(encoded(finite, Storage.F16, QuantType.F32, "x")) == finite.astype(np.float32).tobytes()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 65520, 9e6 * 127])
def test_numbers_that_a_type_cannot_hold(bad: float) -> None:
    for place in range(0, 320, 37):
        numbers = np.ones(320, np.float32)
        numbers[place] = bad
        for kind in (QuantType.F16, QuantType.Q8_0):
            if kind is QuantType.F16 or abs(bad) != 65520:
                with pytest.raises(ModelFileError, match=r"does not fit|not finite"):
                    encoded(numbers, Storage.F32, kind, "x")
    assert bytes(encoded(np.array([65519], np.float32), Storage.F32, QuantType.F16, "x")) == b"\xff\x7b"
    stored = encoded(np.array([bad], np.float32), Storage.F32, QuantType.BF16, "x")
    kept = np.frombuffer(stored, np.uint16).astype(np.uint32) << 16
    assert np.isnan(kept.view(np.float32)[0]) == np.isnan(bad)


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.5] * 8}


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ({"type": "linear", "factor": 2}, {"scaling.type": "linear", "scaling.factor": 2.0}),
        (_YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}),
        ({"type": "dynamic", "factor": 2.0}, {}),
        (_LLAMA3 | {"original_max_position_embeddings": 64}, {}),
        (_LONG | {"original_max_position_embeddings": 64}, {"scaling.type": "longrope"}),
    ],
    ids=lambda value: str(value.get("type", value.get("rope_type"))) if "factor" in value else None,
)
def test_stretched_rotation(said: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = checkpoint("LlamaForCausalLM")
    model = converted(tmp_path, config | {"rope_scaling": said}, tensors)
    found = {key.removeprefix("llama.rope."): value for key, value in model.metadata.items() if ".rope.scaling" in key}
    assert {key: found.get(key) for key in keys} == keys and (keys or not found)
    kind = said.get("type", said.get("rope_type"))
    assert ("rope_freqs.weight" in model.tensors) == (kind == "llama3")
    if kind == "llama3":
        factors = read(model, "rope_freqs.weight")
        assert factors[0] == 1 and factors[-1] == 8 and (np.diff(factors) >= 0).all()
    if kind == "longrope":
        np.testing.assert_array_equal(read(model, "rope_factors_long.weight"), [2.0] * 8)
        assert found["scaling.attn_factor"] == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)


@pytest.mark.parametrize(("original", "kept"), [(64.0, 3), (float(np.float32(2 * math.pi)), 0)])
def test_equal_frequency_factors_of_llama_4_scout(original: float, kept: int, tmp_path: Path) -> None:
    """The second length is the wavelength of pair 0."""
    config, tensors = checkpoint("LlamaForCausalLM")
    said = _LLAMA3 | {"original_max_position_embeddings": original, "high_freq_factor": 1.0}
    factors = read(converted(tmp_path, config | {"rope_scaling": said}, tensors), "rope_freqs.weight")
    np.testing.assert_array_equal(factors, [1.0] * kept + [8.0] * (8 - kept))


def test_f16_that_cannot_hold_a_number_is_named(tmp_path: Path) -> None:
    config, tensors = checkpoint("LlamaForCausalLM")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000
    with pytest.raises(ModelFileError, match=r"up_proj.weight': 70000 does not fit f16.*--type bf16"):
        converted(tmp_path, config, tensors, "f16")
    assert not list(tmp_path.glob("*.gguf"))
