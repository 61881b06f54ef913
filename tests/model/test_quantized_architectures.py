"""Compares every architecture in Q8_0 with llama.cpp's logits of the same weights, recorded in `data/architectures`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import LIMITS, Chain, batch_of
from support.models.tiny.requantized import requantized
from support.models.tiny_architectures import (
    DECODED_STRIDE,
    DECODED_TOKENS,
    MODELS,
    TOKENS,
    VOCABULARY,
    build_architecture,
)
from support.paths import DATA

BOUND = 2e-3
"""The bound of the median error over positions; rounding of a router may change the experts of some positions."""
FURTHER = 2.5
"""The largest ratio of our error to llama.cpp's, both against float32 logits of the same weights. Both programs round
activations to 8 bits in different ways; many layers or steep functions amplify that."""


def computed(path: Path, name: str) -> NDArray[np.float32]:
    """Returns every fourth logit of a prefill and of decode steps."""
    tokens, start = [*TOKENS, *DECODED_TOKENS], len(TOKENS)
    blocks = range(-(-len(tokens) // KV_BLOCK_TOKENS), -1, -1)
    model = Model.open(path)
    chain = Chain(all_threads(1), model, (), replace(LIMITS, max_context_tokens=MODELS[name].context))
    try:
        rows = [chain.run(batch_of([(TOKENS, range(start), blocks)]))]
        rows += [chain.run(batch_of([([tokens[at]], [at], blocks)])) for at in range(start, len(tokens))]
    finally:
        chain.close()
        model.close()
    return np.concatenate(rows)[:, ::DECODED_STRIDE]


def median_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Returns the median over positions of sum((found - wanted)^2) / sum(wanted^2)."""
    exact = wanted.astype(np.float64)
    return float(np.median(((found - exact) ** 2).sum(axis=1) / (exact**2).sum(axis=1)))


@pytest.mark.parametrize("name", MODELS)
def test_quantized_models_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path = requantized(build_architecture(tmp_path / "model.gguf", name), "Q8_0")
    shape = len(TOKENS) + len(DECODED_TOKENS), VOCABULARY // DECODED_STRIDE
    recorded = np.fromfile(DATA / "architectures" / f"{name}.q8_0.f16", "<f2").astype(np.float32).reshape(shape)
    found = computed(path, name)
    if median_error(found, recorded) > BOUND:
        exact = computed(requantized(path, "F32"), name)
        assert median_error(found, exact) <= FURTHER * median_error(recorded, exact)
