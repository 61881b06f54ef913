"""Seeded random generators of GPU tests."""

from __future__ import annotations

import numpy as np


def generator() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)
