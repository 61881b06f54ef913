"""Tests promise 1 on the demo model, in fixed ways with real worker processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.clusters.invariance import Answer, Way, Work, check_answers, make_work, run

LAYERS = 30
VOCABULARY = 49152
KV_HEADS, HEAD_DIM = 3, 64
SEED = 21

WAYS = (
    Way((0, 30), threads=3, company=True),
    Way((0, 30), prefill_chunk=1, feature_level="avx512"),
    Way((0, 30), threads=2, feature_level="avx2", cached=True),
    Way((0, 1, 30), threads=2, prefill_chunk=7, company=True),
    Way((0, 16, 30), feature_level="avxvnni", prefill_chunk=2048, preempted=True),
    Way((0, 29, 30), prefill_chunk=64, cached=True),
    Way((0, 7, 9, 30), feature_level="avx512vnni", preempted=True),
    Way((0, 5, 12, 13, 22, 30), threads=2, company=True, cached=True),
)

pytestmark = pytest.mark.model


def work() -> Work:
    return make_work(SEED, VOCABULARY, KV_HEADS, HEAD_DIM)


@pytest.fixture(scope="module")
def expected(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with pytest.MonkeyPatch.context() as patch:
        return run(demo_model, Way((0, LAYERS), every=True), work(), tmp_path_factory.mktemp("expected"), patch)


@pytest.mark.promise
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_fixed_ways(
    way: Way, demo_model: Path, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamaclust.kernels import _native

    if way.feature_level is not None and way.feature_level not in _native.available_levels():
        pytest.skip(f"this machine has no {way.feature_level}")
    answers = run(demo_model, way, work(), tmp_path, monkeypatch)
    check_answers(answers, expected)
