"""Tests of the measured choice of how to prefetch weights for a token: only clear differences count, and bits are
equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels import _native
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.rpc.cache_flush import largest_cache_bytes
from support.arithmetic.batches import batch_of, load_stage
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

LIMITS = StageLimits(max_batch_tokens=16, max_outputs=16, max_sequences=8, max_context_tokens=64, kv_blocks=8)
MOST_CACHE_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    before = _native.prefetches_near()
    _native.set_prefetches_near(None)
    yield
    _native.set_prefetches_near(before)


def test_what_is_clearly_faster_in_the_median_is_taken() -> None:
    source = Random(SEED)
    far_ns = [source.randrange(10**6, 10**8) for _ in range(9)]
    assert _native.prefers_near(far_ns, [ns * 95 // 100 for ns in far_ns])
    assert not _native.prefers_near(far_ns, [ns * 99 // 100 for ns in far_ns]), "that may be noise"
    disturbed = [ns * (3 if pair in (1, 2, 5, 8) else 0.9) for pair, ns in enumerate(far_ns)]
    assert _native.prefers_near(far_ns, [int(ns) for ns in disturbed])
    assert not _native.prefers_near([int(ns) for ns in disturbed], far_ns)


@pytest.mark.parametrize("times", [([], []), ([1, 2], [1])])
def test_times_come_in_pairs(times: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="as many"):
        _native.prefers_near(*times)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_same_bits_both_ways(rows: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    build_tiny_model(path, layers=2, hidden=256, ffn=512)
    stage = load_stage(CpuBackend(threads=2), Model.open(path), limits=LIMITS)
    assert _native.prefetches_near() is None, "weights that a cache holds are not measured"
    batch = batch_of([(range(5, 5 + rows), range(rows), range(1))], outputs=range(rows))
    results = []
    for near in (False, True):
        _native.set_prefetches_near(near)
        results.append(stage.run(batch, None).copy())
    far, near_bits = (result.view(np.uint32) for result in results)
    assert np.array_equal(far, near_bits)


def test_a_stage_larger_than_the_cache_finds_out_once(tmp_path: Path) -> None:
    if largest_cache_bytes() > MOST_CACHE_BYTES:
        pytest.skip("a model larger than this machine's last cache would take long to make")
    path = tmp_path / "model.gguf"
    build_tiny_model(path, layers=1, hidden=1024, ffn=16384, quant_type=QuantType.F16)
    model = Model.open(path)
    load_stage(CpuBackend(threads=1), model, limits=LIMITS)
    found = _native.prefetches_near()
    assert found is not None
    _native.set_prefetches_near(not found)
    load_stage(CpuBackend(threads=1), model, limits=LIMITS)
    assert _native.prefetches_near() is not found
