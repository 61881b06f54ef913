"""Tests of architectures as programs: rotation frequencies, steps, checks of tensors, and the loader's results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaclust.core.errors import ModelFileError
from llamaclust.model.architectures import build_program
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.costs import all_macs
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.hyperparameters import RopeParameters, RopeScaling
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Attention, Buffer, Embed, MatMul, Moe, Program, Rope, SelectRows
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.mixtures import ExpertChoice, ExpertShards
from llamaclust.model.steps.options import RopeStyle
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

PLAIN = RopeParameters(
    dimension_count=64,
    frequency_base=10000.0,
    scaling=RopeScaling.NONE,
    factor=1.0,
    original_context_length=4096,
    attention_factor=1.0,
    extrapolation_factor=1.0,
    beta_fast=32.0,
    beta_slow=1.0,
)


def test_plain_frequencies() -> None:
    table = rope_table(PLAIN)
    assert table.scale == 1.0
    np.testing.assert_allclose(table.frequencies, 10000.0 ** (-np.arange(32) / 32), rtol=1e-15)


def test_frequencies_have_the_same_bits_everywhere() -> None:
    """Checks that frequencies are correctly rounded from the exact 10000^(-1/32), 10000^(-1/2) and 10000^(-31/32)."""
    frequencies = rope_table(PLAIN).frequencies
    assert frequencies[0] == 1.0
    assert frequencies[1] == float("0.7498942093324558273021842756")
    assert frequencies[16] == 0.01
    assert frequencies[31] == float("0.0001333521432163324025675931715")


def test_linear_scaling_divides() -> None:
    table = rope_table(replace(PLAIN, scaling=RopeScaling.LINEAR, factor=4.0))
    assert [4 * frequency for frequency in table.frequencies] == list(rope_table(PLAIN).frequencies)


def test_factors_divide() -> None:
    factors = tuple(1.0 + i for i in range(32))
    expected = np.array(rope_table(PLAIN).frequencies) / factors
    np.testing.assert_allclose(rope_table(PLAIN, factors).frequencies, expected, rtol=1e-15)


def yarn_of_ggml(rope: RopeParameters) -> tuple[list[float], float]:
    """Computes ggml_rope_yarn_corr_dims and rope_yarn for position 1."""

    def corr_dim(turns: float) -> float:
        ratio = rope.original_context_length / (turns * 2 * math.pi)
        return rope.dimension_count * math.log(ratio) / (2 * math.log(rope.frequency_base))

    low = max(0, math.floor(corr_dim(rope.beta_fast)))
    high = min(rope.dimension_count - 1, math.ceil(corr_dim(rope.beta_slow)))
    out = []
    for i in range(rope.dimension_count // 2):
        theta = rope.frequency_base ** (-2 * i / rope.dimension_count)
        ramp = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
        mix = ramp * rope.extrapolation_factor
        out.append(theta / rope.factor * (1 - mix) + theta * mix)
    return out, rope.attention_factor * (1 + 0.1 * math.log(rope.factor))


@pytest.mark.parametrize("context", [64, 4096, 32768])
def test_yarn_is_that_of_ggml(context: int) -> None:
    rope = replace(PLAIN, scaling=RopeScaling.YARN, factor=8.0, original_context_length=context, attention_factor=0.9)
    frequencies, magnitude = yarn_of_ggml(rope)
    np.testing.assert_allclose(rope_table(rope).frequencies, frequencies, rtol=1e-13)
    assert rope_table(rope).scale == pytest.approx(magnitude, rel=1e-14)
    assert frequencies != list(rope_table(replace(rope, scaling=RopeScaling.LINEAR)).frequencies)


def test_yarn_without_extrapolation_is_linear() -> None:
    rope = replace(PLAIN, scaling=RopeScaling.YARN, factor=8.0, extrapolation_factor=0.0)
    assert rope_table(rope) == rope_table(replace(rope, scaling=RopeScaling.LINEAR))


def test_yarn_needs_a_base() -> None:
    with pytest.raises(ModelFileError, match=r"rope\.freq_base: expected more than 1 with YaRN, found 1"):
        rope_table(replace(PLAIN, scaling=RopeScaling.YARN, factor=2.0, frequency_base=1.0))


def test_tables_are_computed_once() -> None:
    assert rope_table(replace(PLAIN)) is rope_table(replace(PLAIN))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelFile]:
    """Returns a function that opens a tiny model; equal arguments give the same one."""
    folder, made = tmp_path_factory.mktemp("architectures"), dict[str, ModelFile]()

    def build(**options: Any) -> ModelFile:
        key = repr(sorted(options.items()))
        if key not in made:
            sizes = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 96} | options
            made[key] = open_model(build_tiny_model(folder / f"{len(made)}.gguf", **sizes))
        return made[key]

    return build


def kinds(program: Program) -> list[str]:
    return [type(step).__name__ for step in program.steps]


def test_llama_as_a_list_of_steps(make: Callable[..., ModelFile]) -> None:
    program = build_program(make(layers=1), 0, 1)
    attention = ["RmsNorm", "MatMul", "MatMul", "MatMul", "Rope", "Rope", "Attention", "MatMul", "Add"]
    feed_forward = ["RmsNorm", "MatMul", "MatMul", "SiluMul", "MatMul", "Add"]
    assert kinds(program) == ["Embed", "GivenRows", *attention, *feed_forward, "RmsNorm", "SelectRows", "MatMul"]
    step = program.kv_layers[0]
    assert (step.heads, step.kv_heads, step.head_dim, step.scale) == (4, 2, 16, 0.25)
    assert program.hidden.width == 64
    assert program.out.width == 320


@pytest.mark.parametrize(("architecture", "window"), [("llama", 20), ("qwen2", None), ("baichuan", None)])
def test_a_window_that_not_all_obey(make: Callable[..., ModelFile], architecture: str, window: int | None) -> None:
    model = make(architecture=architecture, layers=32, extra={f"{architecture}.attention.sliding_window": 20})
    assert {step.window for step in build_program(model, 0, 32).kv_layers} == {window}


@pytest.mark.parametrize("options", [{}, {"experts": 4}, {"architecture": "qwen2"}, {"tied": True}], ids=str)
@given(data=st.data())
def test_stages_are_the_whole_program_cut(
    make: Callable[..., ModelFile], options: dict[str, Any], data: st.DataObject
) -> None:
    model = make(layers=5, **options)
    cuts = sorted(data.draw(st.sets(st.integers(1, 4))))
    bounds = [0, *cuts, 5]
    stages = [build_program(model, bounds[i], bounds[i + 1]) for i in range(len(bounds) - 1)]
    whole = build_program(model, 0, 5)
    assert [step for stage in stages for step in stage.steps] == list(whole.steps)
    assert all(stage.is_first == (stage.start == 0) and stage.is_last == (stage.end == 5) for stage in stages)
    assert all(stage.out == stage.hidden for stage in stages[:-1])
    assert stages[-1].out == whole.out


def test_every_tensor_of_the_file_is_named(make: Callable[..., ModelFile]) -> None:
    for options in ({}, {"experts": 4}, {"architecture": "qwen2"}):
        model = make(**options)
        assert set(build_program(model, 0, 3).weights) == set(model.tensors)


def test_the_embedding_is_the_head_of_a_tied_model(make: Callable[..., ModelFile]) -> None:
    model = make(tied=True)
    last = build_program(model, 2, 3).steps[-1]
    assert isinstance(last, MatMul)
    assert last.weight == "token_embd.weight"


def test_styles_and_biases(make: Callable[..., ModelFile]) -> None:
    for architecture, style, biased in (("llama", RopeStyle.NORM, False), ("qwen2", RopeStyle.NEOX, True)):
        program = build_program(make(architecture=architecture), 1, 2)
        assert {step.style for step in program.steps if isinstance(step, Rope)} == {style}
        biases = [step.bias for step in program.steps if isinstance(step, MatMul) and step.bias]
        assert biases == ([f"blk.1.attn_{part}.bias" for part in "qkv"] if biased else [])


def test_biases_of_llama_are_optional(make: Callable[..., ModelFile]) -> None:
    model = make()
    bias = replace(model.tensor("blk.0.attn_norm.weight"), name="blk.0.attn_output.bias")
    program = build_program(with_tensors(model, bias), 0, 1)
    found = [step.bias for step in program.steps if isinstance(step, MatMul) and step.bias]
    assert found == ["blk.0.attn_output.bias"]


def test_experts(make: Callable[..., ModelFile]) -> None:
    program = build_program(make(experts=4), 0, 3)
    steps = [step for step in program.steps if isinstance(step, Moe)]
    assert [(step.experts, step.used, step.ffn_width) for step in steps] == [(4, 2, 96)] * 3


def test_rope_factors_come_from_the_file(make: Callable[..., ModelFile]) -> None:
    plain, divided = (build_program(make(rope_factors=factors), 0, 1).steps for factors in (False, True))
    tables = [next(step for step in steps if isinstance(step, Rope)).table for steps in (plain, divided)]
    tensor = make(rope_factors=True).tensor("rope_freqs.weight")
    ratio = np.array(tables[0].frequencies) / np.array(tables[1].frequencies)
    np.testing.assert_allclose(ratio, np.frombuffer(tensor.read(), "<f4"), rtol=1e-12)


def with_tensors(model: ModelFile, *tensors: Any, without: tuple[str, ...] = ()) -> ModelFile:
    kept = {name: tensor for name, tensor in model.tensors.items() if name not in without}
    return replace(model, tensors=kept | {tensor.name: tensor for tensor in tensors})


def test_a_missing_tensor_is_named(make: Callable[..., ModelFile]) -> None:
    model = make()
    for name in model.tensors:
        if name == "output.weight":
            continue
        with pytest.raises(ModelFileError, match=rf"{name}.*missing"):
            build_program(with_tensors(model, without=(name,)), 0, 3)


def test_a_missing_bias_of_qwen2_is_named(make: Callable[..., ModelFile]) -> None:
    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_k\.bias"):
        build_program(with_tensors(make(architecture="qwen2"), without=("blk.1.attn_k.bias",)), 0, 3)


@pytest.mark.parametrize("experts", [0, 4])
def test_a_wrong_shape_is_named(make: Callable[..., ModelFile], experts: int) -> None:
    model = make(experts=experts)
    for name, tensor in model.tensors.items():
        wrong = replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] + 1))
        with pytest.raises(ModelFileError, match=rf"tensor {name}: expected shape \[.*\]"):
            build_program(with_tensors(model, wrong), 0, 3)


def test_vectors_must_be_float32(make: Callable[..., ModelFile]) -> None:
    model = make()
    norm = replace(model.tensor("blk.0.ffn_norm.weight"), quant_type=QuantType.F16)
    with pytest.raises(ModelFileError, match=r"ffn_norm\.weight: expected type F32, found F16"):
        build_program(with_tensors(model, norm), 0, 3)


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_biases_of_experts_have_no_blocks(tmp_path: Path, part: str) -> None:
    """Checks that biases which a group's members cannot divide are refused on one worker too."""
    model = open_model(build_architecture(tmp_path / "m.gguf", "gpt-oss"))
    bias = model.tensor(f"blk.0.ffn_{part}_exps.bias")
    build_program(with_tensors(model, replace(bias, quant_type=QuantType.BF16)), 0, 1)
    with pytest.raises(ModelFileError, match=rf"_{part}_exps\.bias: expected type F32, F16, BF16, found Q8_0"):
        build_program(with_tensors(model, replace(bias, quant_type=QuantType.Q8_0)), 0, 1)


def test_rope_factors_must_be_positive(make: Callable[..., ModelFile]) -> None:
    model = make(rope_factors=True)
    factors = model.tensor("rope_freqs.weight")
    negative = replace(factors, offset=model.tensor("token_embd.weight").offset)
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight: .*positive"):
        build_program(with_tensors(model, negative), 0, 3)


def test_experts_in_tensors_of_their_own_are_refused(make: Callable[..., ModelFile]) -> None:
    model = make(experts=4)
    old = replace(model.tensor("blk.0.ffn_gate_exps.weight"), name="blk.0.ffn_gate.0.weight")
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_gate\.0\.weight.*convert"):
        build_program(with_tensors(model, old), 0, 3)


def test_an_unknown_architecture_is_named(make: Callable[..., ModelFile]) -> None:
    model = make()
    other = replace(model, metadata={**model.metadata, "general.architecture": "mamba"})
    with pytest.raises(ModelFileError, match=r"'mamba' is not one of the \d+ supported architectures"):
        build_program(other, 0, 3)
    with pytest.raises(ModelFileError, match="mamba"):
        Model(other)


def test_baichuan_of_another_size_is_refused(make: Callable[..., ModelFile]) -> None:
    model = make(architecture="baichuan")
    with pytest.raises(ModelFileError, match=r"block_count.*3 layers.*ALiBi"):
        build_program(model, 0, 3)


def test_an_unused_tensor_is_refused(make: Callable[..., ModelFile]) -> None:
    model = make()
    extra = replace(model.tensor("blk.0.attn_norm.weight"), name="blk.0.attn_q_norm.weight")
    with pytest.raises(ModelFileError, match=r"blk\.0\.attn_q_norm\.weight.*not part of architecture llama"):
        Model(with_tensors(model, extra))


@pytest.mark.parametrize("experts", [0, 4])
def test_costs_add_up_to_all_tensors(make: Callable[..., ModelFile], experts: int) -> None:
    model = Model(make(experts=experts))
    costs = model.costs(KvType.F16)
    held = costs.embedding_bytes + costs.head_bytes + sum(layer.weight_bytes for layer in costs.layers)
    assert held == sum(tensor.resident_bytes for tensor in model.file.tensors.values())
    layer, networks = costs.layers[1], 2 if experts else 1
    attention = 64 * (64 + 32 + 32 + 64)
    assert layer.macs_per_token == attention + networks * 3 * 64 * 96 + 64 * experts
    assert layer.idle_bytes == (2 * 3 * 64 * 96 * 2 if experts else 0)
    assert layer.idle_share == (0.5 if experts else 0.0)
    assert layer.kv_bytes_per_token == 2 * 32 * 2
    assert model.costs(KvType.Q8_0).layers[1].kv_bytes_per_token == 2 * 2 * (16 + 2)
    assert (costs.head_macs, costs.embedding_bytes) == (64 * 320, 64 * 320 * 2)


@pytest.mark.parametrize(("gate", "fused"), [("gate", False), ("gate", True), (None, False)])
def test_products_of_experts_are_counted_by_the_widths_of_both_sides(gate: str | None, fused: bool) -> None:
    """Checks a mixture whose output is wider than its input; its shards have equally many products in total."""
    x, out, routed = Buffer("x", 48), Buffer("out", 80), Buffer("routed", 96)
    inner = None if fused else gate
    mixture = Moe(x, out, "router", inner, "up", "down", experts=8, used=2, ffn_width=32, routed=routed, fused=fused)
    up = 2 * 2 * 32 * 48 if gate is not None else 2 * 32 * 48
    assert all_macs([mixture]) == 96 * 8 + up + 2 * 32 * 80
    assert {weight.name: weight.macs for weight in mixture.weights}["down"] == 2 * 32 * 80
    choice = ExpertChoice(mixture, Buffer("choice", 4))
    shards = [ExpertShards(mixture, choice.out, Buffer("results", 160), (range(at, at + 2),)) for at in range(0, 8, 2)]
    assert all_macs([choice, *shards]) == all_macs([mixture])


def test_a_stage_is_given_its_own_tensors_only(make: Callable[..., ModelFile]) -> None:
    model = Model(make())
    program = model.program(1, 2)
    tensors = model.tensors_for(program)
    assert all(name.startswith("blk.1.") and tensor.name == name for name, tensor in tensors.items())
    assert len(tensors) == 9
    assert not any(isinstance(step, Embed | SelectRows) for step in program.steps)
    assert [step.layer for step in program.steps if isinstance(step, Attention)] == [1]


def test_the_chat_template_ends_with_the_model(make: Callable[..., ModelFile]) -> None:
    """Other tests' processes may end meanwhile, so only the new ones are counted."""
    before = set(psutil.Process().children())
    with Model(make()) as model:
        assert "hello" in model.chat_template.render([{"role": "user", "content": "hello"}])
        (process,) = set(psutil.Process().children()) - before
    assert not process.is_running()
    Model(make()).close()


def test_the_tokenizer_is_built_on_first_use(make: Callable[..., ModelFile]) -> None:
    model = Model(make())
    ids = model.tokenizer.encode("hello")
    assert model.tokenizer.decode(ids, skip_special=True).strip() == "hello"
    assert model.tokenizer is model.tokenizer
    assert model.model_id == model.file.identity
