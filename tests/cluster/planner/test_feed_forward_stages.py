"""Tests of stages of feed-forward layers alone, which have neither keys and values nor states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import InsufficientMemoryError, ModelFileError
from llamaclust.core.sizes import MIB
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from support.arithmetic.batches import Chain
from support.models.tiny.mamba import Mamba
from support.models.tiny.shape import Tiny
from support.models.tiny_architectures import MODELS, TOKENS, build_tiny
from support.plans.plan_inputs import REQUEST, profile, split_by_hand

CUTS = (1, 3)
"""Splits whose middle stage has feed-forward layers alone."""


def nemotron(blocks: tuple[int, ...]) -> Tiny:
    """Returns a model of four layers: feed-forward networks in `blocks`, attention in the others."""
    attention = np.array([0 if layer in blocks else 2 for layer in range(4)], np.int32)
    if not attention.any():
        attention[0] = 2  # of a layer with a feed-forward network instead of attention
    widths = np.array([96 if layer in blocks else 0 for layer in range(4)], np.int32)
    usual = MODELS["nemotron_h"]
    keys = {**usual.keys, "attention.head_count_kv": attention, "feed_forward_length": widths}
    return replace(usual, layers=4, single_blocks=blocks, mamba=Mamba((), groups=4, heads=16), keys=keys)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("given", [None, MIB])
@pytest.mark.parametrize("memory_bytes", [None, 64 * MIB])
def test_such_a_stage_has_room_for_the_blocks_of_others(
    tmp_path: Path, objective: str, given: int | None, memory_bytes: int | None
) -> None:
    """Such a stage is planned by the planner and by the user, and computes the same bits."""
    with Model.open(build_tiny(tmp_path / "m.gguf", nemotron((1, 2)))) as model:
        costs = model.costs(KvType.F16)
        workers = [WorkerFacts(name, memory_bytes, profile()) for name in "abc"]
        request = replace(REQUEST, objective=objective, kv_memory_bytes=given, context_length=256)
        manual = split_by_hand(*zip("abc", (0, *CUTS), (*CUTS, 4), strict=True))
        plan = make_plan(costs, workers, replace(request, manual=manual))
        assert [(stage.start, stage.end) for stage in plan.stages] == [(0, 1), (1, 3), (3, 4)]
        alone = make_plan(costs, workers[:1], replace(request, manual=split_by_hand(("a", 0, 4))))
        assert plan.kv_blocks >= alone.kv_blocks > 0
        assert make_plan(costs, workers, request).kv_blocks > 0
        chains = [Chain(CpuBackend(1), model, cuts) for cuts in ((), CUTS)]
        whole, cut = (chain.logits(TOKENS, 5) for chain in chains)
        for chain in chains:
            chain.close()
        assert whole.std() > 0
        np.testing.assert_array_equal(whole.view(np.uint32), cut.view(np.uint32))


def test_such_a_stage_needs_memory_for_its_weights(tmp_path: Path) -> None:
    with Model.open(build_tiny(tmp_path / "m.gguf", nemotron((1, 2)))) as model:
        workers = [WorkerFacts(name, memory, profile()) for name, memory in (("a", None), ("b", 1000), ("c", None))]
        manual = split_by_hand(("a", 0, 1), ("b", 1, 3), ("c", 3, 4))
        with pytest.raises(InsufficientMemoryError):
            make_plan(model.costs(KvType.F16), workers, replace(REQUEST, manual=manual, context_length=256))


def test_a_model_of_such_layers_alone_is_refused(tmp_path: Path) -> None:
    path = build_tiny(tmp_path / "m.gguf", nemotron((0, 1, 2, 3)))
    with pytest.raises(ModelFileError, match="none of the model's 4 layers has attention or a state"):
        Model.open(path)
