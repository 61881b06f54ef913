"""Compares other weights and tokens than `test_originals` with an installed transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.models.converted import assert_close, converted
from support.models.original_models import MODELS, recorded_form
from support.models.record_originals import original_logits
from support.models.tiny_architectures import VOCABULARY

pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_other_weights_and_tokens(name: str, seed: int, tmp_path: Path) -> None:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 40).tolist()
    model = converted(tmp_path, *recorded_form(name), seed)
    assert_close(model, name, tokens, original_logits(MODELS[name], tmp_path, tokens), may_be_tied=True)
