"""Tests of models with a gated delta net: the layers with it, their keys, and several file formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.architectures import build_program
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Attention, Program, Rope, SequenceState
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.states import DeltaRule, StatePart
from support.models.tiny.delta_net import DeltaNet, KimiDelta
from support.models.tiny_architectures import MODELS, build_architecture

Make = Callable[[str], ModelFile]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("delta")

    def made(name: str) -> ModelFile:
        path: Path = folder / f"{name}.gguf"
        return open_model(path if path.exists() else build_architecture(path, name))

    return made


def changed(file: ModelFile, keys: Mapping[str, Any]) -> ModelFile:
    """Returns the file with changed keys of its architecture; None removes a key."""
    prefix = file.metadata["general.architecture"]
    metadata = {**file.metadata, **{f"{prefix}.{key}": value for key, value in keys.items()}}
    return replace(file, metadata={key: value for key, value in metadata.items() if value is not None})


def whole(file: ModelFile, layers: int = 5) -> Program:
    return build_program(file, 0, layers)


@pytest.mark.parametrize("name", ["qwen3next", "qwen3next-old", "qwen35", "qwen35moe"])
def test_every_second_layer_has_attention(make: Make, name: str) -> None:
    """Checks that the other layers have two states: the convolution's last rows and the delta rule's state."""
    kept, delta = whole(make(name)).kv_memory, MODELS[name].delta
    assert isinstance(delta, DeltaNet)
    width = (2 * delta.key_heads + delta.heads) * delta.dim
    states = {
        layer: [
            SequenceState(layer, StatePart.CONVOLUTION, (delta.taps - 1) * width),
            SequenceState(layer, StatePart.RECURRENCE, delta.heads * delta.dim**2),
        ]
        for layer in (0, 2, 4)
    }
    for layer in range(5):
        of_layer = [part for part in kept if part.layer == layer]
        assert of_layer == states[layer] if layer in states else isinstance(of_layer[0], Attention)


def test_kimi_linear_has_four_states_a_layer(make: Make) -> None:
    """Checks states of the convolutions of q, k and v and of the delta rule; layers with KV heads keep latent keys."""
    file, delta = make("kimi-linear"), MODELS["kimi-linear"].delta
    assert isinstance(delta, KimiDelta)
    rows = (delta.taps - 1) * delta.heads * delta.dim
    convolutions = (StatePart.CONVOLUTION, StatePart.CONVOLUTION_OF_KEYS, StatePart.CONVOLUTION_OF_VALUES)
    for layer in (0, 1, 3, 4):
        *states, last = [part for part in whole(file).kv_memory if part.layer == layer]
        assert states == [SequenceState(layer, part, rows) for part in convolutions]
        assert last == SequenceState(layer, StatePart.RECURRENCE, delta.heads * delta.dim**2)
    assert [(step.layer, step.v) for step in whole(file).kv_layers] == [(2, None)]
    assert not any(isinstance(step, Rope) for step in whole(file).steps)


@pytest.mark.parametrize("shape", [(1, 64, 1, 4), (64, 1, 4), (64, 4)])
def test_convolutions_of_kimi_linear_have_ones_in_their_shapes(
    make: Make, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Checks that other shapes of converters give the same program and weights, and that the file keeps its shape."""
    file, name = make("kimi-linear"), "blk.1.ssm_conv1d_k.weight"
    assert (file.tensor(name).shape, file.tensor("blk.1.ssm_a").shape) == ((1, 64, 1, 4), (1, 1, 4, 1))
    model = Model(file).file
    assert (model.tensor(name).shape, model.tensor("blk.1.ssm_a").shape) == ((64, 4), (4,))

    def source(tensor: Tensor) -> TensorSource:
        sizes = shape if tensor.name == name else tensor.shape
        return TensorSource(tensor.name, tensor.quant_type, sizes, lambda: tensor.read())

    write_gguf(tmp_path / "again.gguf", file.metadata, [source(tensor) for tensor in file.tensors.values()])
    again = open_model(tmp_path / "again.gguf")
    assert whole(again) == whole(file)
    assert again.tensor(name).shape == shape and Model(again).file.tensor(name).shape == (64, 4)
    assert bytes(again.tensor(name).read()) == bytes(file.tensor(name).read())


@pytest.mark.parametrize("name", ["blk.1.ssm_a", "blk.1.ssm_dt.bias"])
@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.BF16])
def test_decays_of_kimi_linear_are_float32(make: Make, name: str, quant_type: QuantType) -> None:
    file = make("kimi-linear")
    tensors = {**file.tensors, name: replace(file.tensor(name), quant_type=quant_type)}
    with pytest.raises(ModelFileError, match=f"{name}: expected type F32, found {quant_type.name}"):
        whole(replace(file, tensors=tensors))


def test_layers_are_named_by_flags_or_by_a_period(make: Make) -> None:
    file = make("qwen3next")
    flags = np.array([True, False, True, False, True, False])
    assert whole(changed(file, {"attention.recurrent_layers": flags})) == whole(file)
    assert whole(changed(file, {"attention.recurrent_layers": flags, "full_attention_interval": 3})) == whole(file)
    for keys in ({"full_attention_interval": None}, {"attention.recurrent_layers": np.ones(5, bool)}):
        with pytest.raises(ModelFileError, match=r"blk.1.attn_qkv.weight.*missing"):
            whole(changed(file, keys))


def test_key_heads_of_qwen_3_5_are_tiled(make: Make) -> None:
    tiled = {
        name: {step.tiled for step in whole(make(name)).steps if isinstance(step, DeltaRule)}
        for name in MODELS
        if isinstance(MODELS[name].delta, DeltaNet)
    }
    assert tiled == {"qwen3next": {False}, "qwen3next-old": {False}, "qwen35": {True}, "qwen35moe": {True}}


def test_layers_that_predict_further_tokens_are_kept_apart(make: Make) -> None:
    """Checks that the last two layers, declared as MTP heads, are in no program and are not refused."""
    file = make("qwen35")
    apart = changed(file, {"nextn_predict_layers": 2})
    assert [step.layer for step in whole(apart, 3).kv_layers] == [1]
    assert Model(apart).layer_count == 3


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("qwen35", {"ssm.conv_kernel": None}, "ssm.conv_kernel.*missing"),
        ("qwen35", {"ssm.conv_kernel": 1}, "ssm.conv_kernel': expected 2 to 16, found 1"),
        ("qwen35", {"ssm.conv_kernel": 17}, "ssm.conv_kernel': expected 2 to 16, found 17"),
        ("qwen35", {"ssm.conv_kernel": 3}, r"ssm_conv1d.weight: expected shape \[3, 128\], found \[4, 128\]"),
        ("qwen35", {"ssm.state_size": 8}, "ssm.state_size': expected a multiple of 16, found 8"),
        ("qwen35", {"ssm.state_size": 1 << 20}, "ssm.state_size': expected 1 to 256, found 1048576"),
        ("qwen35", {"ssm.group_count": 3}, "ssm.group_count': 3 key heads do not divide 4 heads"),
        ("qwen35", {"ssm.group_count": 8}, "ssm.group_count': expected 1 to 4, found 8"),
        ("qwen35", {"ssm.time_step_rank": 0}, "ssm.time_step_rank': expected 1 to 1024, found 0"),
        ("qwen35", {"ssm.inner_size": 96}, "ssm.inner_size': expected 4 heads of 16 channels, found 96 channels"),
        ("qwen35", {"full_attention_interval": 0}, "full_attention_interval': expected 1 to 1024, found 0"),
        (
            "qwen35",
            {"attention.recurrent_layers": np.ones(3, bool)},
            "recurrent_layers': expected 5 numbers, one for each layer, found 3",
        ),
        (
            "qwen35",
            {"attention.recurrent_layers": 1},
            "recurrent_layers': expected an array .* for 5 layers, found '1'",
        ),
        (
            "qwen35",
            {"attention.recurrent_layers": np.ones(5, np.float32)},
            r"recurrent_layers': expected an array of .*, found an array of 5 float32 values",
        ),
        ("qwen35", {"attention.recurrent_layers": "11111"}, "recurrent_layers': expected an array .*, found '11111'"),
        ("qwen35", {"attention.scale": 0.5}, "attention.scale': '?0.5'? is not supported"),
        ("kimi-linear", {"kda.head_dim": None}, "kda.head_dim.*missing"),
        ("kimi-linear", {"kda.head_dim": 24}, "kda.head_dim': expected a multiple of 16, found 24"),
        (
            "kimi-linear",
            {"kda.head_dim": 256, "attention.head_count": 2048},
            "kda.head_dim': 2048 heads of 256 channels have a state of 134217728 numbers; the limit is 67108864",
        ),
        ("kimi-linear", {"kda.head_dim": 32}, r"attn_q.weight: expected shape \[64, 128\], found \[64, 64\]"),
        ("kimi-linear", {"ssm.conv_kernel": 32}, "ssm.conv_kernel': expected 2 to 16, found 32"),
        ("kimi-linear", {"expert_shared_count": None}, "expert_shared_count.*missing"),
        ("qwen3next", {"expert_count": 0, "expert_used_count": 0}, "expert_count': expected 1 expert or more, found 0"),
    ],
)
def test_bad_keys_are_refused(make: Make, name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        whole(changed(make(name), keys))


def test_costs_count_the_arithmetic_of_states(make: Make) -> None:
    """Checks that each number of a state costs four multiply-adds; all weights are float32."""
    file = make("qwen35")
    layers, width, delta = Model(file).costs(KvType.F16).layers, 64, MODELS["qwen35"].delta
    assert isinstance(delta, DeltaNet)
    mixed = (2 * delta.key_heads + delta.heads) * delta.dim
    products = width * (mixed + 2 * delta.heads * delta.dim + 2 * delta.heads) + mixed * delta.taps
    expected = products + 4 * delta.heads * delta.dim**2 + 3 * 64 * 96
    assert (layers[0].macs_per_token, layers[0].float_macs_per_token) == (expected, expected)
