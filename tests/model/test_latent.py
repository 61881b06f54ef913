"""Tests of architectures with latent attention: score scales, gates, KV bytes of a token, and refused files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.architectures import build_program
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Attention, HeadMatMul, Moe, PositionScale, Program, Rope
from llamaclust.model.steps.options import Gating
from support.models.tiny.latent_models import LATENT_MODELS
from support.models.tiny_architectures import build_architecture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latent")


def opened(folder: Path, name: str, **changes: Any) -> ModelFile:
    """Opens a model with changed keys (dots written __); None removes a key."""
    path = folder / f"{name}.gguf"
    model = open_model(path if path.exists() else build_architecture(path, name))
    prefix = LATENT_MODELS[name].architecture
    own = {f"{prefix}.{key.replace('__', '.')}": value for key, value in changes.items()}
    metadata = {key: value for key, value in {**model.metadata, **own}.items() if value is not None}
    return replace(model, metadata=metadata)


def layer_of(model: ModelFile, layer: int = 1) -> Program:
    return build_program(model, layer, layer + 1)


def attention_of(model: ModelFile) -> Attention:
    (step,) = layer_of(model).kv_layers
    return step


def magnitude_of(model: ModelFile) -> float:
    """Returns the magnitude that rotation gives queries and keys."""
    (magnitude,) = {step.table.scale for step in layer_of(model).steps if isinstance(step, Rope)}
    return magnitude


STRETCH = 0.1 * math.log(40)


@pytest.mark.parametrize(
    ("name", "changes", "scale", "magnitude"),
    [
        ("deepseek2", {}, (1 + STRETCH) ** 2, 1.0),
        ("deepseek2-lite", {}, (1 + 0.707 * STRETCH) ** 2, 1.0),
        ("deepseek2", {"rope__scaling__yarn_log_multiplier": None}, (1 + STRETCH) ** 2, 1 + STRETCH),
        ("deepseek2", {"rope__scaling__type": "none"}, 1.0, 1.0),
        ("mistral4", {}, (1 + STRETCH) ** 2, (1 + STRETCH) / (1 + 0.5 * STRETCH)),
    ],
)
def test_stretched_rotations_scale_scores(
    folder: Path, name: str, changes: dict[str, Any], scale: float, magnitude: float
) -> None:
    """Checks that YaRN scales both parts of a score, through the scale or through the rotation's magnitude."""
    model = opened(folder, name, **changes)
    assert attention_of(model).scale == pytest.approx(scale / math.sqrt(40), rel=1e-6)
    assert magnitude_of(model) == pytest.approx(magnitude, rel=1e-6)


def test_a_position_takes_one_key_of_memory(folder: Path) -> None:
    """Checks that each layer keeps one key of 32 channels and 8 rotated ones per token, for any number of heads."""
    for kv_type, bytes_of in ((KvType.F16, 2 * 40), (KvType.Q8_0, 40 + 2 * 2)):
        costs = Model(opened(folder, "deepseek2")).costs(kv_type)
        assert {layer.kv_bytes_per_token for layer in costs.layers} == {bytes_of}
    step = attention_of(opened(folder, "deepseek2"))
    assert (step.head_dim, step.value_dim, step.kv_heads, step.v) == (40, 32, 1, None)


def test_costs_have_the_products_of_heads(folder: Path) -> None:
    model = opened(folder, "deepseek2")
    program = layer_of(model, 0)
    shapes = [step.shape for step in program.steps if isinstance(step, HeadMatMul)]
    assert shapes == [(4, 32, 32), (4, 24, 32)]
    dense = Model(model).costs(KvType.F16).layers[0]
    others = 64 * 48 + 48 * 160 + 64 * 40 + 96 * 64 + 3 * 64 * 96
    assert dense.macs_per_token == others + sum(map(math.prod, shapes))


def test_gates_of_files_without_the_key(folder: Path) -> None:
    """Checks that the gate is softmax, or sigmoid for GLM-4.7-Flash, recognized by its layers and words."""

    def gating(**keys: Any) -> Gating:
        model = opened(folder, "deepseek2", expert_gating_func=None, **keys)
        words = {key: value for key, value in model.metadata.items() if not key.startswith("tokenizer.")}
        (step,) = (step for step in layer_of(replace(model, metadata=words)).steps if isinstance(step, Moe))
        return step.options.gating

    assert gating() is Gating.SOFTMAX
    assert gating(block_count=47, vocab_size=154880) is Gating.SIGMOID
    assert gating(block_count=46, vocab_size=154880) is Gating.SOFTMAX


def test_queries_scaled_by_position(folder: Path) -> None:
    def scales(name: str) -> list[tuple[float, int]]:
        steps = layer_of(opened(folder, name)).steps
        return [(step.factor, step.length) for step in steps if isinstance(step, PositionScale)]

    assert scales("deepseek2") == []
    assert scales("deepseek2-scaled") == [(float(np.float32(0.2)), 8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention__key_length_mla": None},
            "key_length_mla': missing, as in files from before May 2025: convert",
        ),
        (
            {"attention__key_length": 41},
            "attention.key_length': expected 1 KV head of 32 \\+ 8 .*, found 1 of 41",
        ),
        (
            {"attention__key_length_mla": 8},
            "attention.key_length': expected 1 KV head of 32 \\+ 8 .* more than 8, found 1 of 40 and queries of 8",
        ),
        ({"attention__head_count_kv": 2}, "attention.key_length': expected 1 KV head of 32 \\+ 8 .*, found 2 of 40"),
        ({"attention__key_length_mla": 48}, "attn_q_b.weight: expected shape"),
        ({"attention__value_length_mla": 20}, "attn_v_b.weight: expected shape"),
        ({"attention__kv_lora_rank": 0}, "attention.kv_lora_rank': expected 1 to .*, found 0"),
        ({"attention__q_lora_rank": None}, "blk.1.attn_q.weight.*missing"),
        ({"attention__q_lora_rank": 1 << 17}, "attention.q_lora_rank': expected 0 to .*, found 131072"),
        ({"attention__temperature_scale": 0.5}, "attention.temperature_length': expected 1 to .*, found 0"),
        ({"rope__scaling__yarn_log_multiplier": float("inf")}, "yarn_log_multiplier': expected .*, found inf"),
        ({"rope__dimension_count": 6}, "attention.key_length': expected 1 KV head of 32 \\+ 6 .*, found 1 of 40"),
        ({"attention__layer_norm_rms_epsilon": None, "attention__layer_norm_epsilon": 1e-5}, "rms_epsilon': missing"),
        ({"expert_gating_func": 4}, "gating function 4 is not supported"),
        ({"attention__temperature_scale": np.array([1.0], np.float32)}, "attention.temperature_scale"),
    ],
)
def test_files_that_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        layer_of(opened(folder, "deepseek2", **changes))
    assert "\n" not in str(caught.value)
