"""Tests of the pooling that model files declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.loader import Model
from llamaclust.model.pooling import Pooling
from support.models.tiny_model import build_tiny_model


def opened(path: Path, number: int | None) -> Model:
    extra = {} if number is None else {"llama.pooling_type": number}
    return Model.open(build_tiny_model(path / "tiny.gguf", layers=1, hidden=64, heads=4, ffn=96, extra=extra))


@pytest.mark.parametrize(
    ("number", "pooling"),
    [(None, Pooling.LAST), (0, Pooling.NONE), (1, Pooling.MEAN), (2, Pooling.CLS), (3, Pooling.LAST)],
)
def test_the_pooling_of_a_file(number: int | None, pooling: Pooling, tmp_path: Path) -> None:
    assert opened(tmp_path, number).pooling is pooling


def test_an_unknown_pooling_is_refused_at_open(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"llama\.pooling_type"):
        opened(tmp_path, 5)


def test_tokens_whose_hidden_states_are_read() -> None:
    assert {pooling: pooling.rows(7) for pooling in Pooling} == {
        Pooling.NONE: (0, 7),
        Pooling.MEAN: (0, 7),
        Pooling.CLS: (0, 1),
        Pooling.LAST: (6, 7),
        Pooling.RANK: (0, 1),
    }
    assert [pooling.vectors(7) for pooling in Pooling] == [7, 1, 1, 1, 1]
