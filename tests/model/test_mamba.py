"""Tests of models with Mamba 2: the blocks of each layer, and contradictory files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Activate, Attention, Moe, RmsNorm, Rope, Scan, Step
from llamaclust.model.quant_types import QuantType
from support.models.tiny_architectures import MODELS, build_architecture

FAMILIES = ("granitehybrid", "granitehybrid-experts", "falcon-h1", "nemotron_h", "nemotron_h_moe-latent")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    folder = tmp_path_factory.mktemp("mamba")
    models = {name: Model.open(build_architecture(folder / f"{name}.gguf", name)) for name in FAMILIES}
    yield models
    for model in models.values():
        model.close()


def changed(model: Model, **keys: Any) -> Model:
    """Returns the model with changed keys (dots written __); None removes a key."""
    prefix = model.file.metadata["general.architecture"]
    own = {f"{prefix}.{key.replace('__', '.')}": value for key, value in keys.items()}
    metadata = {key: value for key, value in {**model.file.metadata, **own}.items() if value is not None}
    return Model(replace(model.file, metadata=metadata))


def blocks(model: Model) -> list[str]:
    """Returns the blocks of each layer as letters."""
    letters: dict[type[Step], str] = {Scan: "M", Attention: "*", Moe: "E", Activate: "-"}
    layers = (model.program(layer, layer + 1).steps for layer in range(model.layer_count))
    return ["".join(letters.get(type(step), "") for step in steps) for steps in layers]


def test_layers_have_the_blocks_that_the_file_says(models: dict[str, Model]) -> None:
    """Checks the blocks; a convolution and the experts' shared network have activations ("-")."""
    assert blocks(models["granitehybrid"]) == ["-M", "-M", "*", "-M", "*"]
    assert blocks(models["granitehybrid-experts"]) == ["-ME", "-ME", "*E", "-ME", "*E"]
    assert blocks(models["falcon-h1"]) == ["*-M"] * 4
    assert blocks(models["nemotron_h"]) == ["-M", "-", "-M", "*", "-M", "-"]
    assert blocks(models["nemotron_h_moe-latent"]) == ["-M", "E-", "-M", "*", "-M", "E-"]


def test_rotations_are_those_of_the_file(models: dict[str, Model]) -> None:
    """Checks that Granite's key decides on rotations; Nemotron has none."""
    rotations = {
        name: sum(isinstance(step, Rope) for step in model.program(0, model.layer_count).steps)
        for name, model in models.items()
    }
    assert rotations == {
        "granitehybrid": 0,
        "granitehybrid-experts": 4,
        "falcon-h1": 8,
        "nemotron_h": 0,
        "nemotron_h_moe-latent": 0,
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ssm__conv_kernel": None}, "ssm.conv_kernel.*missing"),
        ({"ssm__conv_kernel": 1}, "ssm.conv_kernel': expected 2 to 16, found 1"),
        ({"ssm__conv_kernel": 3}, r"blk.0.ssm_conv1d.weight: expected shape \[3, 192\], found \[4, 192\]"),
        ({"ssm__inner_size": 100}, "ssm.inner_size': 8 heads do not divide 100"),
        (
            {"ssm__inner_size": 8},
            "ssm.inner_size': expected multiples of 16, found 8 and 72 channels of the convolution",
        ),
        ({"ssm__time_step_rank": 0}, "ssm.time_step_rank': expected 1 to .*, found 0"),
        ({"ssm__time_step_rank": 4}, r"blk.0.ssm_in.weight: expected shape \[64, 324\], found \[64, 328\]"),
        ({"ssm__group_count": 3}, "ssm.group_count': 3 groups do not divide 8 heads"),
        ({"ssm__state_size": 1 << 13}, "ssm.state_size': expected 1 to 4096, found 8192"),
        (
            {"ssm__state_size": 4096, "ssm__inner_size": 1 << 15},
            "ssm.state_size': 32768 channels with 4096 numbers each",
        ),
        (
            {
                key: 1 << 14 if key != "ssm__state_size" else 1 << 12
                for key in ("ssm__inner_size", "ssm__time_step_rank", "ssm__group_count", "ssm__state_size")
            },
            "ssm.group_count': 16384 groups of 4096 numbers need 134234112 channels .* 4 taps, the limit is 22369621",
        ),
        ({"attention__head_count_kv": 2}, "blk.0.attn_q.weight.*missing"),
        ({"attention__head_count_kv": np.array([2, 0, 2, 0, 2], np.int32)}, "blk.0.attn_q.weight.*missing"),
        ({"feed_forward_length": np.array([96, 0, 96, 96, 96], np.int32)}, "blk.1.ffn_gate.weight: expected shape"),
        ({"moe_latent_size": 32}, "moe_latent_size': '32' is not supported"),
    ],
)
def test_bad_keys_are_refused(models: dict[str, Model], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        changed(models["granitehybrid"], **keys)


def test_a_router_of_experts_reads_the_hidden_state(models: dict[str, Model]) -> None:
    model = models["nemotron_h_moe-latent"]
    (step,) = (step for step in model.program(1, 2).steps if isinstance(step, Moe))
    assert (step.x.width, step.routed and step.routed.width) == (32, 64)
    with pytest.raises(
        ModelFileError, match=r"blk.1.ffn_latent_down.weight: expected shape \[64, 48\], found \[64, 32\]"
    ):
        changed(model, moe_latent_size=48)
    with pytest.raises(
        ModelFileError, match=r"blk.1.ffn_up_exps.weight: expected shape \[64, 96, 8\], found \[32, 96, 8\]"
    ):
        changed(model, moe_latent_size=None)


def test_the_norm_of_groups_is_one_each(models: dict[str, Model]) -> None:
    """Checks that each group has its own norm; Falcon H1 has none without the tensor."""

    def norms(name: str) -> list[RmsNorm]:
        steps = models[name].program(0, 1).steps
        return [step for step in steps if isinstance(step, RmsNorm) and step.own_weights]

    (norm,) = norms("granitehybrid")
    assert (norm.heads, norm.width) == (2, 64)
    assert not norms("falcon-h1")


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].mamba is not None])
def test_small_tensors_are_float32(name: str, tmp_path: Path) -> None:
    """Checks that decays of heads, which have no quantizable rows, must be float32."""
    with Model.open(build_architecture(tmp_path / "model.gguf", name)) as model:
        tensor = next(name for name in model.file.tensors if name.endswith("ssm_a"))
        tensors = {**model.file.tensors, tensor: replace(model.file.tensors[tensor], quant_type=QuantType.F16)}
        with pytest.raises(ModelFileError, match=f"{tensor}: expected type F32, found F16"):
            Model(replace(model.file, tensors=tensors))


def test_costs_count_states_and_scans(models: dict[str, Model]) -> None:
    """Checks states of 128 x 16 float32 and 3 rows of 192, or keys and values of two heads; Falcon has both."""
    layers = models["granitehybrid"].costs(KvType.F16).layers
    state = 4 * (128 * 16 + 3 * 192)
    assert [layer.state_bytes for layer in layers] == [state, state, 0, state, 0]
    assert [layer.kv_bytes_per_token for layer in layers] == [0, 0, 128, 0, 128]
    falcon = models["falcon-h1"].costs(KvType.F16).layers[0]
    assert falcon.state_bytes == 4 * (96 * 32 + 3 * 224) and falcon.kv_bytes_per_token > 0
