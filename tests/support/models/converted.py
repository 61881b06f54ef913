"""Converts checkpoints and compares their logits with recorded ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.backend import Backend
from llamaclust.kernels.reference import kv
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.loader import Model
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.formats.opening import Hints
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import LIMITS, Chain
from support.models.checkpoint_files import write_hugging_face
from support.models.original_models import MODELS, Shapes, write_original
from support.models.tiny_architectures import VOCABULARY
from support.models.tiny_tokenizers import tokenizer_json

EXACT = 5e-7
"""The largest error with keys and values in float32; recordings in float16 have 6e-8, Falcon's tanh GELU 2e-7."""


ROUNDED = 1e-5
"""The largest error with keys and values in float16."""
EIGHT_BITS = 5e-3
"""The largest median error with 8-bit activations as well, as in the CPU's products with MXFP4 blocks. The median is
robust to tokens whose experts are nearly tied."""


class WholeRows(kv._HalfRows):
    """Keys and values of the reference backend in float32, like those of transformers."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._values: Any = np.full(shape, np.nan, np.float32)

    def store(self, places: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        self._values[places] = rows


def converted(folder: Path, config: Mapping[str, Any], shapes: Shapes, seed: int) -> Model:
    write_original(folder, config, shapes, seed)
    (folder / "tokenizer.json").write_text(tokenizer_json(VOCABULARY))
    convert(folder, folder / "model.gguf", "f32", Hints(), lambda done, total: None, None)
    return Model.open(folder / "model.gguf")


def converted_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], kind: str = "f32"
) -> ModelFile:
    """Converts a checkpoint in Hugging Face's form with the byte-level test tokenizer."""
    write_hugging_face(folder, config, tensors)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    convert(folder, folder / "out.gguf", kind, Hints(), lambda done, total: None, "tiny")
    return open_model(folder / "out.gguf")


def logits(backend: Backend, model: Model, name: str, tokens: list[int]) -> NDArray[np.float32]:
    context = MODELS[name].context
    chain = Chain(backend, model, (1,), replace(LIMITS, max_context_tokens=context))
    try:
        return chain.logits(tokens)
    finally:
        chain.close()


def errors(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns sum((found - wanted)^2) / sum(wanted^2) of each position."""
    squares = np.square(found.astype(np.float64) - wanted).sum(1)
    result: NDArray[np.float64] = squares / np.square(wanted.astype(np.float64)).sum(1)
    return result


def assert_close(
    model: Model, name: str, tokens: list[int], wanted: NDArray[np.float32], *, may_be_tied: bool = False
) -> None:
    """Asserts close logits of the CPU and reference backends, and of the latter with float32 keys and values.
    `may_be_tied`: rounding may change the experts of some tokens."""
    rounded = np.median if may_be_tied else np.max
    for backend in (ReferenceBackend(), all_threads(1)):
        found = errors(logits(backend, model, name, tokens), wanted)
        if MODELS[name].packed and not isinstance(backend, ReferenceBackend):
            assert np.median(found) <= EIGHT_BITS, (backend, found)
        else:
            assert rounded(found) <= ROUNDED, (backend, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "_HalfRows", WholeRows)
        found = errors(logits(ReferenceBackend(), model, name, tokens), wanted)
    assert found.max() <= EXACT, found
