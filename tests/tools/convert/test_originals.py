"""Checks that converted models have the logits of their original implementation, transformers' classes. Weights are
drawn anew (`original_models`); `data/originals` has the results of transformers (`record_originals`)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from support.models.converted import assert_close, converted, errors
from support.models.original_models import MODELS, SEED, recorded_form, recorded_logits
from support.models.tiny_architectures import TOKENS


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    assert_close(converted(tmp_path, *recorded_form(name), SEED), name, TOKENS, recorded_logits(name))


def test_no_two_recordings_are_alike() -> None:
    names = sorted(MODELS)
    assert all(errors(recorded_logits(a), recorded_logits(b)).mean() > 1e-3 for a, b in pairwise(names))
