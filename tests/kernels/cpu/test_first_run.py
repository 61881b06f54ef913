"""Tests that a stage's first run allocates no memory from the system, since loading has done so."""

from __future__ import annotations

from pathlib import Path
from resource import RUSAGE_THREAD, getrusage

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.model.loader import Model
from support.arithmetic.batches import batch_of, load_stage
from support.models.tiny_model import build_tiny_model

LIMITS = StageLimits(max_batch_tokens=512, max_outputs=64, max_sequences=8, max_context_tokens=1024, kv_blocks=64)
ROWS = 300


def page_faults(stage: CpuStage, batch: Batch) -> int:
    """Returns this thread's minor page faults during a run."""
    before = getrusage(RUSAGE_THREAD).ru_minflt
    stage.run(batch, None)
    return getrusage(RUSAGE_THREAD).ru_minflt - before


@pytest.fixture
def stage(tmp_path: Path) -> CpuStage:
    path = tmp_path / "model.gguf"
    build_tiny_model(path, layers=4, hidden=256, ffn=512)
    loaded = load_stage(CpuBackend(threads=1), Model.open(path), limits=LIMITS)
    assert isinstance(loaded, CpuStage)
    return loaded


def test_the_first_run_finds_its_memory(stage: CpuStage) -> None:
    few, many = (batch_of([(range(rows), range(rows), range(-(-rows // 16)))], outputs=[0]) for rows in (16, ROWS))
    assert page_faults(stage, few) < 32
    assert page_faults(stage, many) < 32
    assert np.isfinite(stage.run(many, None)).all()
