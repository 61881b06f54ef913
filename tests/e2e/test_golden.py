"""Compares logits with llama.cpp's, for small models of all weight types, on every backend and feature level.

`NAME.f32` next to `NAME.gguf` has llama.cpp's logits for TOKENS: float32 [24, 320], little-endian."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.backend import Backend
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import Chain
from support.paths import DATA

TOKENS = [1, 5, 9, 300, 33, 65, 100, 3, 7, 11, 277, 90, 2, 64, 127, 31, 260, 270, 280, 290, 19, 1, 150, 200]

# Quantized activations of both programs cause errors of 2e-4 to 5e-4. llama.cpp rounds activations to bf16 for BF16
# weights.
BOUNDS = {
    "tiny/llama": 1e-5,
    "tiny/llama3-rope": 1e-5,
    "tiny/qwen2": 1e-5,
    "tiny/baichuan": 1e-5,
    "quant/BF16": 5e-5,
    "quant/Q8_0": 2e-3,
    "quant/Q6_K": 2e-3,
    "quant/Q4_K_M": 2e-3,
    "quant/Q5_0": 2e-3,
    "quant/Q4_0": 2e-3,
    "quant/mixed": 2e-3,
    "quant/mixed-experts": 2e-3,
}


def golden_path(name: str) -> Path:
    return DATA / f"{name}.gguf"


def test_the_files_hold_every_type() -> None:
    files = [open_model(golden_path(name)) for name in BOUNDS]
    assert {tensor.quant_type for file in files for tensor in file.tensors.values()} == set(SUPPORTED_TYPES)


def error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Returns sum((found - wanted)^2) / sum(wanted^2)."""
    return float(((found.astype(np.float64) - wanted) ** 2).sum() / (wanted.astype(np.float64) ** 2).sum())


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = BACKENDS[request.param]()
    return made


@pytest.mark.parametrize("name", BOUNDS)
def test_logits_are_those_of_llama_cpp(backend: Backend, name: str) -> None:
    path = golden_path(name)
    wanted = np.fromfile(path.with_suffix(".f32"), "<f4").reshape(len(TOKENS), -1)
    chain = Chain(backend, Model.open(path))
    whole, single = chain.logits(TOKENS), chain.logits(TOKENS, chunk=1)
    chain.close()
    assert error(whole, wanted) <= BOUNDS[name]
    for position in range(len(TOKENS)):
        assert error(whole[position], wanted[position]) <= 3 * BOUNDS[name], position
    np.testing.assert_array_equal(single.view(np.uint32), whole.view(np.uint32))


def test_the_bound_notices_one_wrong_number(backend: Backend) -> None:
    """A rotation by one more position or a swapped head gives an error far above the bounds."""
    path = golden_path("tiny/llama")
    wanted = np.fromfile(path.with_suffix(".f32"), "<f4").reshape(len(TOKENS), -1)
    chain = Chain(backend, Model.open(path))
    changed = chain.logits([1, 6, *TOKENS[2:]])
    chain.close()
    assert error(changed[0], wanted[0]) <= 1e-5
    assert min(error(changed[position], wanted[position]) for position in range(1, len(TOKENS))) > 1e-4
