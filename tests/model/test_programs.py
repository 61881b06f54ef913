"""Tests of programs that architectures emit: windows, scales, rotations, experts, checks of tensors, complete costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.model.architectures import build_program
from llamaclust.model.architectures.tensors import FACTOR_TENSORS, idle_kv_tensors
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import FileIdentity
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import (
    Attention,
    GaussianTopK,
    Join,
    Moe,
    Program,
    RmsNorm,
    Rope,
    RopeTable,
    Slice,
    SoftCap,
)
from llamaclust.model.steps.options import Gating
from llamaclust.model.weights.manifest import make_manifest, read_manifest
from llamaclust.worker.stage.stage_runner import model_program
from support.models.tiny_architectures import MODELS, build_architecture


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelFile]:
    """Returns a function that opens one of MODELS with changed keys (dots written __); None removes a key."""
    folder = tmp_path_factory.mktemp("programs")

    def build(name: str, **changes: Any) -> ModelFile:
        path = folder / f"{name}.gguf"
        model = open_model(path if path.exists() else build_architecture(path, name))
        own = {f"{MODELS[name].architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
        metadata = {key: value for key, value in {**model.metadata, **own}.items() if value is not None}
        return replace(model, metadata=metadata)

    return build


def whole(model: ModelFile) -> Program:
    return build_program(model, 0, Model(model).layer_count)


def with_layers(model: ModelFile, layers: int) -> ModelFile:
    """Returns the model with this many layers, copies of the first one."""
    first = [tensor for name, tensor in model.tensors.items() if name.startswith("blk.0.")]
    copies = [
        replace(one, name=one.name.replace("blk.0.", f"blk.{layer}.")) for layer in range(layers) for one in first
    ]
    ends = {name: tensor for name, tensor in model.tensors.items() if not name.startswith("blk.")}
    key = f"{model.metadata['general.architecture']}.block_count"
    return replace(model, metadata={**model.metadata, key: layers}, tensors=ends | {one.name: one for one in copies})


def windows(model: ModelFile) -> list[int | None]:
    return [step.window for step in whole(model).kv_layers]


def tables(model: ModelFile) -> list[RopeTable]:
    return [step.table for step in whole(model).steps if isinstance(step, Rope)][::2]


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_named_checked_and_counted(make: Callable[..., ModelFile], name: str) -> None:
    file = make(name)
    program = whole(file)
    unread = {*FACTOR_TENSORS, *idle_kv_tensors(file)}
    assert set(program.weights) == set(file.tensors) - unread
    cut = [build_program(file, layer, layer + 1) for layer in range(program.layers)]
    carried = (
        (Slice, Join) if name in ("gemma3n", "gemma4-inputs") else ()
    )  # each stage carries the inputs of its own and later layers
    steps = [step for stage in cut for step in stage.steps if not isinstance(step, carried)]
    assert steps == [step for step in program.steps if not isinstance(step, carried)]
    assert [stage.hidden.width for stage in cut[1:]] == [stage.out.width for stage in cut[:-1]]
    opened = Model(file)
    costs = opened.costs(KvType.F16)
    assert costs.hidden_bytes == opened.hidden_bytes == max(4 * stage.out.width for stage in cut[:-1])
    held = costs.head_bytes + sum(layer.weight_bytes for layer in costs.layers)
    held += costs.embedding_bytes - (file.tensor("token_embd.weight").resident_bytes if MODELS[name].tied else 0)
    tensors = opened.file.tensors  # in the shapes that programs read
    assert held == sum(tensor.resident_bytes for name, tensor in tensors.items() if name not in unread)


@pytest.mark.parametrize("name", MODELS)
def test_missing_and_wrong_tensors_are_named(make: Callable[..., ModelFile], name: str) -> None:
    file = make(name)
    optional = {"output.weight", *FACTOR_TENSORS} | (
        {n for n in file.tensors if n.endswith((".bias", *_OPTIONAL.get(MODELS[name].architecture, ())))}
        - qwen_biases(file)
    )
    for tensor in file.tensors.values():
        if tensor.name in {*FACTOR_TENSORS, *idle_kv_tensors(file)}:
            continue
        wrong = replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] + 1))
        with pytest.raises(ModelFileError, match=rf"tensor {tensor.name}: expected shape \[.*\]"):
            whole(replace(file, tensors={**file.tensors, tensor.name: wrong}))
        if tensor.name not in optional:
            others = {n: other for n, other in file.tensors.items() if n != tensor.name}
            with pytest.raises(ModelFileError, match=rf"{wanted_instead(name, tensor.name)}.*missing"):
                whole(replace(file, tensors=others))


_OPTIONAL = {
    "gemma4": ("attn_v.weight", "layer_output_scale.weight", "ffn_down_exps.scale"),
    "falcon-h1": ("ssm_norm.weight",),
}


def wanted_instead(model: str, name: str) -> str:
    """Returns the first of the tensors that could replace a fused one."""
    if MODELS[model].delta is not None:
        return name.replace("ssm_in", "attn_qkv").replace("ssm_ba", "ssm_beta")
    return name.replace("_qkv", "_q").replace("gate_up_exps", "gate_exps")


def test_values_without_a_weight_are_keys(make: Callable[..., ModelFile]) -> None:
    """Checks that values are the keys before their norm."""
    steps = whole(make("gemma4")).steps
    norms = [step for step in steps if isinstance(step, RmsNorm) and step.out.name == "value"]
    assert [norm.x.name for norm in norms] == ["value", "value", "key"] * 2
    assert all(norm.weight is None for norm in norms)


def test_last_layers_read_the_keys_and_values_of_others(make: Callable[..., ModelFile]) -> None:
    attention = [step for step in whole(make("gemma4-inputs")).steps if isinstance(step, Attention)]
    assert [step.layer for step in attention] == [0, 1, 2, 1, 1, 2]
    assert [step.shares_kv for step in attention] == [False] * 3 + [True] * 3
    with pytest.raises(ModelFileError, match="but no layer before layer 2 has the same kind of window"):
        whole(make("gemma4-inputs", attention__shared_kv_layers=5))


def test_sparse_layers_of_gemma_3n_are_those_of_the_file(make: Callable[..., ModelFile]) -> None:
    """Checks that layers with -inf in the file have no sparsity step, and that the others have the file's number."""
    scales = np.array([1.5, -np.inf, -0.25] + [-np.inf] * 19, np.float32)
    steps = whole(make("gemma3n", activation_sparsity_scale=scales)).steps
    assert [step.factor for step in steps if isinstance(step, GaussianTopK)] == [1.5, -0.25]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_sparsity_scale", np.ones(21, np.float32), "expected 22 numbers, one for each layer, found 21"),
        ("activation_sparsity_scale", np.full(22, np.nan, np.float32), "expected -inf, or -16 to 16, found nan"),
        ("activation_sparsity_scale", np.full(22, np.inf, np.float32), "expected -inf, or -16 to 16, found inf"),
        ("activation_sparsity_scale", 1.5, "expected an array of numbers for 22 layers"),
        ("activation_sparsity_scale", None, "missing"),
        ("altup__num_inputs", 1, "expected 2 to 16, found 1"),
        ("altup__num_inputs", None, "missing"),
        ("altup__active_idx", 4, "expected 0 to 3, found 4"),
        ("attention__shared_kv_layers", None, "missing"),
        ("attention__sliding_window", 0, "expected 1 to .*, found 0"),
        ("embedding_length_per_layer_input", 0, "expected 1 to .*, found 0"),
    ],
)
def test_keys_of_gemma_3n_are_checked(make: Callable[..., ModelFile], key: str, value: object, message: str) -> None:
    with pytest.raises(ModelFileError, match=f"{key.replace('__', '.')}'?: .*{message}"):
        whole(make("gemma3n", **{key: value}))


def test_a_layer_without_kv_heads_has_no_attention(make: Callable[..., ModelFile]) -> None:
    with pytest.raises(ModelFileError, match="head_count_kv': the count is 0 in layer 1, which has attention"):
        whole(make("qwen3", attention__head_count_kv=np.array([2, 0, 2], np.int32)))


def qwen_biases(file: ModelFile) -> set[str]:
    return {name for name in file.tensors if str(file.metadata["general.architecture"]).startswith("qwen2")}


def test_layers_with_a_window(make: Callable[..., ModelFile]) -> None:
    assert windows(make("gemma2")) == [6, None, 6, None]
    assert windows(make("gemma2", attention__sliding_window=None)) == [4096, None, 4096, None]
    assert windows(make("gemma2", attention__sliding_window_pattern=3)) == [6, 6, None, 6]
    assert windows(make("gemma2", attention__sliding_window_pattern=0)) == [6, 6, 6, 6]
    each = np.array([False, True, True, False])
    assert windows(make("gemma2", attention__sliding_window_pattern=each)) == [None, 6, 6, None]
    assert windows(make("gemma3")) == [6, 6, 6, 6, 6, None, 6]
    assert windows(make("gemma3", attention__sliding_window=None)) == [None] * 7
    for name in ("qwen3", "qwen3moe", "qwen2moe", "internlm2", "gemma", "chatglm"):
        assert set(windows(make(name, attention__sliding_window=6))) == {None}
    for name in ("phi3-short", "phi3-long", "starcoder2", "llama-linear"):
        assert set(windows(make(name, attention__sliding_window=6))) == {6}
        assert set(windows(make(name, attention__sliding_window=0))) == {None}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (np.array([True]), "expected 4 numbers, one for each layer, found 1"),
        (-1, "expected 0 to .*, found -1"),
        ("all", "sliding_window_pattern"),
    ],
)
def test_patterns_that_make_no_sense(make: Callable[..., ModelFile], pattern: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        whole(make("gemma2", attention__sliding_window_pattern=pattern))


def test_soft_caps(make: Callable[..., ModelFile]) -> None:
    program = whole(make("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None))
    assert {step.soft_cap for step in program.kv_layers} == {50.0}
    assert [step.cap for step in program.steps if isinstance(step, SoftCap)] == [30.0]
    plain, capped = whole(make("gemma3")), whole(make("gemma3", final_logit_softcapping=20.0))
    assert {step.soft_cap for step in plain.kv_layers} == {None}
    assert len(capped.steps) == len(plain.steps) + 1 and isinstance(capped.steps[-1], SoftCap)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_their_width(make: Callable[..., ModelFile], name: str, layers: int) -> None:
    usual = whole(with_layers(make(name), layers - 1)).kv_layers
    largest = whole(with_layers(make(name), layers)).kv_layers
    assert {step.scale for step in usual} == {1 / math.sqrt(32)}
    assert {step.scale for step in largest} == {1 / math.sqrt(64 // 4)}


def test_windowed_layers_of_gemma3_turn_in_their_own_way(make: Callable[..., ModelFile]) -> None:
    found = tables(make("gemma3"))
    assert found[0] == found[4] == found[6] != found[5]
    np.testing.assert_allclose(found[0].frequencies, 10000.0 ** (-np.arange(16) / 16), rtol=1e-12)
    np.testing.assert_allclose(found[5].frequencies, 1e6 ** (-np.arange(16) / 16) / 8, rtol=1e-12)
    other = tables(make("gemma3", rope__freq_base_swa=500.0))
    np.testing.assert_allclose(other[0].frequencies, 500.0 ** (-np.arange(16) / 16), rtol=1e-12)
    assert other[5] == found[5]
    alike = tables(make("gemma3", attention__sliding_window=None))
    assert set(alike) == {found[5]}


def test_factors_are_chosen_by_the_context(make: Callable[..., ModelFile]) -> None:
    file = make("phi3-short")
    plain = np.array(tables(replace(file, tensors=without(file, *FACTOR_TENSORS)))[0].frequencies)

    def factors(context: int | None) -> list[float]:
        program = build_program(file, 0, 1, KvType.F16, context)
        step = next(step for step in program.steps if isinstance(step, Rope))
        assert step.table.scale == pytest.approx(1.19)
        quotients: list[float] = (plain / np.array(step.table.frequencies)).tolist()
        return quotients

    short, long = (np.frombuffer(file.tensor(name).read(), "<f4") for name in FACTOR_TENSORS[1:])
    for context, expected in ((512, short), (64, short), (513, long), (None, long)):
        np.testing.assert_allclose(factors(context), expected, rtol=1e-6)


def without(file: ModelFile, *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in file.tensors.items() if name not in names}


def test_parts_of_a_product_lie_side_by_side(make: Callable[..., ModelFile]) -> None:
    program = build_program(make("chatglm"), 1, 2)
    parts = [
        (step.x.name, step.start, step.out.name, step.out.width) for step in program.steps if isinstance(step, Slice)
    ]
    qkv, ffn = "query+key+value", "gate+up"
    assert parts[:3] == [(qkv, 0, "query", 64), (qkv, 64, "key", 32), (qkv, 96, "value", 32)]
    assert parts[3:] == [(ffn, 0, "gate", 96), (ffn, 96, "up", 96)]


def test_experts(make: Callable[..., ModelFile]) -> None:
    for name, normalized in (("qwen2moe", False), ("qwen3moe", True), ("llama-experts", True)):
        assert {step.options.normalized for step in whole(make(name)).steps if isinstance(step, Moe)} == {normalized}
        with pytest.raises(ModelFileError, match=r"expert_weights_scale.*'2\.5' is not supported"):
            whole(make(name, expert_weights_scale=2.5))


def test_experts_by_keys(make: Callable[..., ModelFile]) -> None:
    """Checks that gates, groups and scale follow from the keys, and that the first layer has no experts."""
    (step, *others) = [step for step in whole(make("bailingmoe2")).steps if isinstance(step, Moe)]
    assert len(others) == MODELS["bailingmoe2"].layers - 2
    assert (step.options.gating, step.options.groups, step.options.used_groups, step.options.scale) == (
        Gating.SIGMOID,
        4,
        2,
        2.5,
    )
    assert step.options.normalized and step.selection_bias == "blk.1.exp_probs_b.bias"
    plain = make(
        "bailingmoe2", expert_weights_norm=None, expert_gating_func=1, expert_group_count=1, expert_group_used_count=0
    )
    (step, *_) = [step for step in whole(plain).steps if isinstance(step, Moe)]
    assert (step.options.gating, step.options.groups, step.options.normalized) == (Gating.SOFTMAX, 1, False)
    assert whole(make("gpt-oss", expert_gating_func=3)) == whole(make("gpt-oss"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_gating_func": 4}, "gating function 4 is not supported; supported are 1 \\(softmax\\), 2 "),
        ({"expert_group_count": 5}, "expert_group_count': 16 experts in 5 groups, 4 chosen from 2 groups"),
        ({"expert_group_count": 16}, "expert_group_count': 16 experts in 16 groups"),
        ({"expert_group_used_count": 5}, "expert_group_used_count': expected 0 to 4, found 5"),
        ({"expert_weights_norm": 1}, "expert_weights_norm': expected true or false, found '1'"),
        ({"expert_weights_scale": float("nan")}, "expert_weights_scale': expected .*, found nan"),
        ({"leading_dense_block_count": 2}, "blk.1.ffn_gate.weight.*missing"),
        ({"expert_shared_count": 2}, "ffn_gate_shexp.weight: expected shape"),
        ({"swiglu_clamp_exp": np.array([7.0], np.float32)}, "swiglu_clamp_exp': .*not supported"),
    ],
)
def test_experts_that_are_refused(make: Callable[..., ModelFile], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        whole(make("bailingmoe2", **keys))


def test_heads_that_predict_further_tokens_are_kept_apart(make: Callable[..., ModelFile]) -> None:
    model = make("glm4moe", block_count=5, nextn_predict_layers=1)
    extra = replace(model.tensor("output_norm.weight"), name="blk.4.nextn.hnorm.weight")
    opened = Model(replace(model, tensors={**model.tensors, extra.name: extra}))
    assert opened.layer_count == 4 and extra.name not in whole(opened.file).weights
    with pytest.raises(ModelFileError, match=r"blk\.4\.nextn.*not part of architecture"):
        Model(replace(make("glm4moe"), tensors=opened.file.tensors))


def without_sections(program: Program) -> Program:
    steps = (replace(step, sections=None) if isinstance(step, Rope) else step for step in program.steps)
    return replace(program, steps=tuple(steps))


SECTIONED = ("qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe")


@pytest.mark.parametrize("name", SECTIONED)
@pytest.mark.parametrize("sections", [(2, 1, 1, 0), (1, 1, 0), (2, 1, 0, 1), (0, 0, 0, 0)])
def test_sections_turn_all_pairs_with_a_text(
    make: Callable[..., ModelFile], name: str, sections: tuple[int, ...]
) -> None:
    """Checks that sections change nothing else, and that pairs outside of all sections rotate by time."""
    program = whole(make(name, rope__dimension_sections=np.array(sections, np.int32)))
    assert without_sections(program) == without_sections(whole(make(name)))
    assert all(max(step.sections or ()) < 4 for step in program.steps if isinstance(step, Rope))


@pytest.mark.parametrize("name", SECTIONED)
def test_sections_that_make_no_sense_are_refused(make: Callable[..., ModelFile], name: str) -> None:
    pairs = Model(make(name)).hyperparameters.rope.dimension_count // 2
    for value, message in (
        (None, "rope.dimension_sections.*missing"),
        (4, "expected an array of whole numbers, found '4'"),
        (np.array([2, 1, 1], np.float32), r"expected an array of whole numbers, found an array of 3 float32 values"),
        (np.array([2, 2], np.int32), "expected 3 sections or more, found 2"),
        (np.array([2, 1, 1, 0, 0], np.uint8), "expected at most 4 numbers, found 5"),
        (np.array([1, -1, 0], np.int32), rf"\[1, -1, 0\]', with a sum of 0; expected .* at most {pairs} "),
        (np.array([pairs, 1, 0, 0], np.int32), rf"with a sum of {pairs + 1}; expected .* at most {pairs} "),
        (np.array([1 << 31] * 3, np.uint32), f"with a sum of {3 << 31}; expected"),
    ):
        with pytest.raises(ModelFileError, match=message):
            whole(make(name, rope__dimension_sections=value))


def test_values_as_wide_as_keys(make: Callable[..., ModelFile]) -> None:
    assert {
        (step.head_dim, step.q.width) for step in whole(make("qwen3")).kv_layers if isinstance(step, Attention)
    } == {(32, 128)}
    with pytest.raises(ModelFileError, match=r"value_length.*expected 32, the length of keys, found 16"):
        whole(make("qwen3", attention__value_length=16))


@pytest.mark.parametrize("name", MODELS)
def test_a_worker_without_the_file_computes_the_same(make: Callable[..., ModelFile], name: str, tmp_path: Path) -> None:
    """Checks that a worker with the manifest and the needed tensors builds the same program for the planned context."""
    pattern = {"attention__sliding_window_pattern": np.array([True, True, False, True])} if name == "gemma2" else {}
    file, limits = make(name, **pattern), StageLimits(8, 8, 2, MODELS[name].context, 64)
    (tmp_path / "manifest").write_bytes(make_manifest(file))
    manifest, held = read_manifest(tmp_path / "manifest"), dict[str, tuple[Path, FileIdentity]]()
    for record in manifest.tensors:
        if record.name in FACTOR_TENSORS:
            place = tmp_path / record.content
            place.write_bytes(file.tensor(record.name).read())
            with place.open("rb") as opened:
                held[record.content] = (place, FileIdentity.of(opened.fileno()))
    absent = Model(manifest.file(tmp_path / "nowhere", held))
    program = model_program(absent, 0, 2, limits)
    assert program == build_program(file, 0, 2, KvType.F16, MODELS[name].context)
    if name.startswith("phi3"):
        other = model_program(absent, 0, 2, replace(limits, max_context_tokens=1280 - limits.max_context_tokens))
        assert other != program
