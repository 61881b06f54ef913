"""Checks that pooled hidden states have the defined values and that chunking does not change their bits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.cluster.front.text.embedder import Pooler, normalized
from llamaclust.cluster.scheduler.requests import PromptEmbedded
from llamaclust.model.pooling import Pooling

ROWS = np.random.default_rng(5).standard_normal((37, 12)).astype(np.float32)


def pooled(pooling: Pooling, rows: NDArray[np.float32], chunk: int) -> list[NDArray[np.float64]]:
    pooler = Pooler(pooling)
    first, end = pooling.rows(len(rows))
    for start in range(first, end, chunk):
        part = rows[start : min(start + chunk, end)]
        pooler.add(PromptEmbedded(start, len(part), part.tobytes()))
    return pooler.vectors()


@pytest.mark.parametrize("pooling", Pooling)
def test_chunks_change_no_bit(pooling: Pooling) -> None:
    whole = pooled(pooling, ROWS, len(ROWS))
    for chunk in (1, 5, 16):
        for vector, other in zip(whole, pooled(pooling, ROWS, chunk), strict=True):
            np.testing.assert_array_equal(vector.view(np.uint64), other.view(np.uint64))


def test_pooling_by_definition() -> None:
    np.testing.assert_allclose(pooled(Pooling.MEAN, ROWS, 9)[0], ROWS.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(pooled(Pooling.CLS, ROWS, 9)[0], ROWS[0])
    np.testing.assert_array_equal(pooled(Pooling.LAST, ROWS, 9)[0], ROWS[-1])
    np.testing.assert_array_equal(pooled(Pooling.NONE, ROWS, 9), ROWS)


@pytest.mark.parametrize("norm", [2, 1, 3, 400])
def test_norms_are_one(norm: int) -> None:
    vector = normalized(ROWS[0].astype(np.float64), norm).astype(np.float64)
    assert vector.dtype == np.float64
    assert np.linalg.norm(vector, norm) == pytest.approx(1, abs=1e-6)


def test_other_norms() -> None:
    wide = ROWS[0].astype(np.float64)
    np.testing.assert_array_equal(normalized(wide, -1), ROWS[0])
    assert np.abs(normalized(wide, 0)).max() == pytest.approx(32760)
    for norm in (-1, 0, 1, 2, 3):
        np.testing.assert_array_equal(normalized(np.zeros(4), norm), np.zeros(4, np.float32))
