"""Checks that a model file's sampling values become request fields, and that invalid values are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.recommended_sampling import recommended_sampling
from support.models.tiny_model import build_tiny_model


def recommended(path: Path, **values: Any) -> dict[str, Any]:
    extra = {f"general.sampling.{key}": value for key, value in values.items()}
    return recommended_sampling(open_model(build_tiny_model(path, extra=extra)))


def test_each_key_of_llama_cpp_has_its_request_field(tmp_path: Path) -> None:
    found = recommended(
        tmp_path / "m.gguf",
        temp=np.float32(0.6),
        top_k=20,
        top_p=np.float32(0.95),
        min_p=np.float32(0.0),
        penalty_repeat=np.float32(1.05),
        penalty_last_n=-1,
        xtc_probability=np.float32(0.1),
        xtc_threshold=np.float32(0.2),
        mirostat=2,
        mirostat_tau=np.float32(4.0),
        mirostat_eta=np.float32(0.2),
        sequence="top_k;typ_p;infill;temperature;top_k",
    )
    assert found == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repeat_penalty": 1.05,
        "repeat_last_n": -1,
        "xtc_probability": 0.1,
        "xtc_threshold": 0.2,
        "mirostat": 2,
        "mirostat_tau": 4.0,
        "mirostat_eta": 0.2,
        "samplers": ["top_k", "typ_p", "temperature"],
    }


@pytest.mark.parametrize(
    "values",
    [
        {"temp": float("nan")},
        {"temp": -1.0},
        {"temp": "hot"},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 1.5},
        {"mirostat": 3},
        {"sequence": "infill"},
        {"unknown": 1},
    ],
)
def test_what_no_request_could_have_is_left_out(tmp_path: Path, values: dict[str, Any]) -> None:
    assert recommended(tmp_path / "m.gguf", **values) == {}
