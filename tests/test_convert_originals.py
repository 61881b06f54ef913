"""Converted models give the logits of their original implementation, transformers' classes.

Weights are drawn anew (`original_models`); `data/originals` holds what transformers wrote and computed
(`record_originals`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import all_threads
from batches import LIMITS, Chain
from numpy.typing import NDArray
from original_models import MODELS, SEED, Shapes, recorded_form, recorded_logits, write_original
from tiny_architectures import TOKENS, VOCABULARY
from tiny_tokenizers import tokenizer_json

from llamaclust.kernels.backend import Backend
from llamaclust.kernels.reference import kv
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.opening import Hints

EXACT = 5e-7
"""Without rounding of keys and values; the recordings' own is 6e-8, and Falcon's GELU by tanh instead of erf 2e-7."""
ROUNDED = 1e-5
"""With keys and values in float16."""


class WholeRows(kv._HalfRows):
    """Keys and values of the reference backend in float32, as the originals keep them."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._values: Any = np.full(shape, np.nan, np.float32)

    def store(self, places: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        self._values[places] = rows


def converted(folder: Path, config: Mapping[str, Any], shapes: Shapes, seed: int) -> Model:
    write_original(folder, config, shapes, seed)
    (folder / "tokenizer.json").write_text(tokenizer_json(VOCABULARY))
    convert(folder, folder / "model.gguf", "f32", Hints(), lambda done, total: None, None)
    return Model.open(folder / "model.gguf")


def logits(backend: Backend, model: Model, name: str, tokens: list[int]) -> NDArray[np.float32]:
    context = MODELS[name].context
    chain = Chain(backend, model, (1,), replace(LIMITS, max_context_tokens=context))
    try:
        return chain.logits(tokens)
    finally:
        chain.close()


def errors(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """sum((found - wanted)^2) / sum(wanted^2) of each position."""
    squares = np.square(found.astype(np.float64) - wanted).sum(1)
    result: NDArray[np.float64] = squares / np.square(wanted.astype(np.float64)).sum(1)
    return result


def assert_close(model: Model, name: str, tokens: list[int], wanted: NDArray[np.float32]) -> None:
    """On the CPU and by the reference; then by the reference without what float16 takes away."""
    for backend in (ReferenceBackend(), all_threads(1)):
        found = errors(logits(backend, model, name, tokens), wanted)
        assert found.max() <= ROUNDED, (backend, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "_HalfRows", WholeRows)
        found = errors(logits(ReferenceBackend(), model, name, tokens), wanted)
    assert found.max() <= EXACT, found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    assert_close(converted(tmp_path, *recorded_form(name), SEED), name, TOKENS, recorded_logits(name))


def test_no_two_recordings_are_alike() -> None:
    names = sorted(MODELS)
    assert all(errors(recorded_logits(a), recorded_logits(b)).mean() > 1e-3 for a, b in pairwise(names))
