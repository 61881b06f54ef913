"""Tests of the conversion of Hunyuan, Ling 2 and MiniMax M2: keys and unsupported settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import convert_checkpoint
from llamaclust.tools.convert.lazy import constant
from llamaclust.tools.convert.settings import Checkpoint
from support.models.checkpoints.shapes import HEAD, LAYERS
from support.models.random_checkpoints import checkpoint

DENSE, MOE = "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"
BAILING, MINIMAX = "BailingMoeV2ForCausalLM", "MiniMaxM2ForCausalLM"


def model_of(case: str, folder: Path, more: dict[str, NDArray[Any]] | None = None, **change: Any) -> ConvertedModel:
    config, tensors = checkpoint(case)
    lazy = {name: constant(values, name) for name, values in {**tensors, **(more or {})}.items()}
    return convert_checkpoint(Checkpoint(case, Settings(config | change, "config.json"), lazy, folder, "tiny"))


@pytest.mark.parametrize(("alpha", "context"), [(50.0, 256), (1000.0, 1 << 18)])
@pytest.mark.parametrize("case", [DENSE, MOE])
def test_alpha_stretches_the_base_for_texts_of_all_lengths(
    case: str, alpha: float, context: int, tmp_path: Path
) -> None:
    """Checks published settings, whose kind is dynamic and whose factors are unused."""
    said = {"type": "dynamic", "alpha": alpha, "factor": 1.0, "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 0.0}
    model = model_of(case, tmp_path, rope_scaling=said)
    wanted = 10000.0 * alpha ** (HEAD / (HEAD - 2))
    assert model.metadata[f"{model.architecture}.rope.freq_base"] == pytest.approx(wanted)
    assert model.metadata[f"{model.architecture}.context_length"] == context
    assert not model.notes and not any(".rope.scaling" in key for key in model.metadata)
    dynamic = model_of(case, tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.metadata[f"{model.architecture}.rope.freq_base"] == 10000 and len(dynamic.notes) == 1


def test_layers_of_predictions_of_ling_are_left_out(tmp_path: Path) -> None:
    behind = {f"model.layers.{LAYERS}.{name}.weight": np.ones(4, np.float32) for name in ("eh_proj", "final_layernorm")}
    model = model_of(BAILING, tmp_path, behind, num_nextn_predict_layers=1)
    assert model.tensors.keys() == model_of(BAILING, tmp_path).tensors.keys() and len(model.notes) == 1
    assert model.metadata["bailingmoe2.block_count"] == LAYERS
    with pytest.raises(ModelFileError, match="not a tensor of bailingmoe2, nor is 1 other"):
        model_of(BAILING, tmp_path, behind, num_nextn_predict_layers=0)


def test_a_part_of_each_head_turns(tmp_path: Path) -> None:
    assert model_of(BAILING, tmp_path).metadata["bailingmoe2.rope.dimension_count"] == HEAD // 2
    for change, wanted in (
        ({}, HEAD // 2),
        ({"rotary_dim": None}, HEAD),
        ({"rotary_dim": None, "partial_rotary_factor": 0.25}, HEAD // 4),
    ):
        assert model_of(MINIMAX, tmp_path, **change).metadata["minimax-m2.rope.dimension_count"] == wanted


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (DENSE, {"use_qk_norm": False}, "false is not supported by hunyuan-dense"),
        (DENSE, {"use_cla": True}, "true is not supported by hunyuan-dense"),
        (DENSE, {"rope_scaling": {"type": "dynamic", "alpha": -1}}, "expected 0 to 1e.06, found -1"),
        (DENSE, {"rope_scaling": {"type": "dynamic", "alpha": 0.5}}, "expected a number of 1 or more, found 0.5"),
        (MOE, {"moe_topk": [2, 1]}, r"'moe_topk': expected 2 equal numbers, found \[2, 1\]"),
        (MOE, {"moe_topk": [2]}, r"'moe_topk': expected 2 equal numbers, found \[2\]"),
        (MOE, {"moe_topk": [5, 5]}, "expected a whole number of 1 to 4, found 5"),
        (MOE, {"moe_topk": []}, r"expected 2 equal numbers, found \[\]"),
        (MOE, {"num_experts": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        (MOE, {"norm_topk_prob": False}, "false is not supported by hunyuan-moe"),
        (BAILING, {"use_qkv_bias": True}, "true is not supported by bailingmoe2"),
        (BAILING, {"use_qk_norm": False}, "false is not supported by bailingmoe2"),
        (BAILING, {"score_function": "softmax"}, "'softmax' is not supported; expected sigmoid"),
        (BAILING, {"num_experts": 10**9}, "expected a whole number of 1 to 1024, found 1000000000"),
        (BAILING, {"n_group": 3}, "3 does not divide 4 experts"),
        (MINIMAX, {"scoring_func": "softmax"}, "'softmax' is not supported; expected sigmoid"),
        (MINIMAX, {"scoring_func": "a\nb\x1b[31m"}, r"'a\\nb\\x1b\[31m' is not supported; expected sigmoid"),
        (BAILING, {"score_function": "a\nb"}, r"'a\\nb' is not supported; expected sigmoid"),
        (MINIMAX, {"rotary_dim": 7}, "expected an even number of channels, found 7"),
        (MINIMAX, {"rotary_dim": 64}, "expected a whole number of 1 to 16, found 64"),
        (MINIMAX, {"num_experts_per_tok": 5}, "expected a whole number of 1 to 4, found 5"),
    ],
)
def test_what_no_key_can_say(case: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message):
        model_of(case, tmp_path, **change)
