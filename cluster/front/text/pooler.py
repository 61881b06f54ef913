"""Pools hidden states in token order, in float64: the same bits for every chunking and every cut of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.scheduler.requests import PromptEmbedded
from llamaclust.model.pooling import Pooling

Float64 = NDArray[np.float64]
Vector = NDArray[np.float32]

EUCLIDEAN = 2
"""The norm that embeddings have by default."""
_INT16 = 32760.0


class Pooler:
    """Takes the rows of one prompt as they come."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._rows: list[Float64] = []  # of Pooling.MEAN: one row, their sum
        self.count = 0  # rows so far

    def add(self, event: PromptEmbedded) -> None:
        hidden = np.frombuffer(event.data, "<f4").reshape(event.count, -1)
        for row in hidden.astype(np.float64):
            self.count += 1
            if self._pooling is Pooling.MEAN and self._rows:
                self._rows[0] += row
            else:
                self._rows.append(row)

    def vectors(self) -> list[Float64]:
        """Of each token without pooling, else one: [embedding]."""
        if self._pooling is Pooling.MEAN:
            return [self._rows[0] / self.count]
        return self._rows


def normalized(vector: Float64, norm: int = EUCLIDEAN) -> Vector:
    """llama.cpp's norms: -1 none, 0 the greatest absolute value to 32760, otherwise the p-norm to 1."""
    length = _length(vector, norm)
    return np.asarray(vector / length if length > 0 else vector * 0, np.float32)


def _length(vector: Float64, norm: int) -> float:
    """Sums are exact before they are rounded, so that no instruction set has a say."""
    if norm < 0:
        return 1.0
    magnitudes: Sequence[float] = np.abs(vector).tolist()
    if norm == 0:
        return max(magnitudes) / _INT16
    if norm == EUCLIDEAN:
        return math.sqrt(math.fsum(value * value for value in magnitudes))
    greatest = max(magnitudes)  # taken out, since a high power of it may be no float
    if greatest == 0:
        return 0.0
    return float(greatest * math.fsum((value / greatest) ** norm for value in magnitudes) ** (1 / norm))
