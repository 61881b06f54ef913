"""Checks that a model that is padded with zeros (benchmarks/runner/padded.py) gives the same results."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import build_tiny_model
from support.paths import ROOT

_SCRIPT = ROOT / "benchmarks/runner/padded.py"


def logits(path: Path, tokens: list[int]) -> np.ndarray:
    with Model.open(path) as model:
        program = model.program(0, model.layer_count)
        limits = StageLimits(len(tokens), len(tokens), 1, 16, 1)
        stage = ReferenceBackend().load(program, model.tensors_for(program), limits, lambda done_bytes: None)
        rows = np.arange(len(tokens), dtype=np.int32)
        starts = np.array([0, len(tokens)], np.int32)
        batch = Batch(np.array(tokens, np.int32), rows, starts, np.array([0, 1], np.int32), np.zeros(1, np.int32), rows)
        return np.array(stage.run(batch, None))


def test_zeros_change_nothing(tmp_path: Path) -> None:
    narrow = build_tiny_model(tmp_path / "narrow.gguf", hidden=192, heads=6, kv_heads=3, layers=2, ffn=256, tied=True)
    runpy.run_path(str(_SCRIPT))["write_padded"](narrow, tmp_path / "wide.gguf", 256)
    with Model.open(tmp_path / "wide.gguf") as wide:
        assert wide.file.tensor("blk.0.attn_q.weight").shape == (256, 256)
        assert wide.file.tensor("blk.0.attn_k.weight").shape == (128, 256)
        assert wide.file.tensor("blk.0.attn_q.weight").quant_type == QuantType.F16
    tokens = [3, 44, 7, 250, 9]
    expected = logits(narrow, tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits(tmp_path / "wide.gguf", tokens), expected, atol=2e-4 * np.abs(expected).max())
