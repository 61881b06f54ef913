"""Checks that the benchmark's random models are complete files of the given shape, with weights of plausible size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.model_keys import read_hyperparameters
from support.clusters.forked_commands import forked_script
from support.paths import ROOT

SCRIPT = ROOT / "benchmarks/shape.py"
TYPES = [
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
]
SMALL = ["--layers", "2", "--hidden", "256", "--ffn", "512", "--heads", "8", "--kv-heads", "2", "--vocabulary", "300"]


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_small_shape_of_every_type(tmp_path: Path, quant_type: str) -> None:
    path = tmp_path / "shape.gguf"
    done = forked_script(SCRIPT, "1.1b", quant_type, str(path), *SMALL)
    assert done.returncode == 0, done.stderr
    model = open_model(path)
    parameters = read_hyperparameters(model)
    kv_width = parameters.head_count_kv * parameters.key_length
    assert (parameters.block_count, kv_width, parameters.vocabulary_size) == (2, 64, 300)
    matrix = model.tensor("blk.1.ffn_down.weight")
    assert matrix.shape == (256, 512) and matrix.quant_type.name == quant_type
    weights = dequantize(matrix.quant_type, matrix.read(), 256 * 512) * np.sqrt(512)
    assert np.isfinite(weights).all() and 0.7 < float(weights.std()) < 1.5 and abs(float(weights.mean())) < 0.2


def test_a_small_shape_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "shape.gguf"
    done = forked_script(SCRIPT, "1.1b", "Q4_K", str(path), *SMALL, "--experts", "4", "--experts-used", "3")
    assert done.returncode == 0, done.stderr
    model = open_model(path)
    parameters = read_hyperparameters(model)
    assert (parameters.expert_count, parameters.expert_used_count) == (4, 3)
    assert model.tensor("blk.1.ffn_down_exps.weight").shape == (4, 256, 512)
    assert model.tensor("blk.1.ffn_gate_inp.weight").shape == (4, 256)
    assert "blk.1.ffn_down.weight" not in model.tensors
    refused = forked_script(SCRIPT, "1.1b", "Q4_K", str(path), *SMALL, "--experts", "1")
    assert refused.returncode == 2 and "2 of 1 experts" in refused.stderr


def test_a_shape_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    done = forked_script(SCRIPT, "1.1b", "Q4_K", str(tmp_path / "shape.gguf"), "--hidden", "96")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
