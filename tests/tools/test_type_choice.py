"""Compares tensor types of mixes with llama-quantize's, recorded by tests/support/arithmetic/quantize_shapes.py."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.type_choice import MixChoice, choose_types
from support.arithmetic.quantize_shapes import SHAPES, grouped, write_shape
from support.paths import DATA

_RECORDED = json.loads((DATA / "quantize/choices.json").read_text())


@pytest.mark.parametrize("title", SHAPES)
def test_types_are_those_of_llama_quantize(tmp_path: Path, title: str) -> None:
    model = open_model(write_shape(tmp_path / "model.gguf", SHAPES[title]))
    for name, mix in MIXES.items():
        for mark in ("", "+"):
            chosen = choose_types(model, MixChoice(mix, has_importance=mark == "+"))
            wanted = _RECORDED[title].get(name + mark, _RECORDED[title][name])
            ours = grouped({tensor: kind.name for tensor, kind in chosen.items() if "_norm" not in tensor})
            assert ours == wanted, (title, name + mark)


def test_wishes_go_before_the_mix(tmp_path: Path) -> None:
    model = open_model(write_shape(tmp_path / "model.gguf", SHAPES["plain"]))
    wishes = MixChoice(
        MIXES["Q4_K_M"],
        output_type=QuantType.Q8_0,
        embedding_type=QuantType.Q5_0,
        by_pattern=((re.compile(r"blk\.1\..*_v"), QuantType.Q3_K), (re.compile("_v"), QuantType.Q2_K)),
    )
    types = choose_types(model, wishes)
    assert types["output.weight"] == QuantType.Q8_0 and types["token_embd.weight"] == QuantType.Q5_0
    assert types["blk.1.attn_v.weight"] == QuantType.Q3_K and types["blk.2.attn_v.weight"] == QuantType.Q2_K
    pure = choose_types(model, MixChoice(MIXES["Q4_K_M"], pure=True, keep_output=True))
    matrices = {kind for name, kind in pure.items() if "norm" not in name and name != "output.weight"}
    assert matrices == {QuantType.Q4_K} and pure["output.weight"] == QuantType.F16
    floats = choose_types(model, MixChoice(MIXES["F16"], by_pattern=((re.compile("_v"), QuantType.Q8_0),)))
    assert floats["blk.0.attn_v.weight"] == QuantType.Q8_0 and floats["blk.0.attn_k.weight"] == QuantType.F16


def test_an_architecture_with_rules_of_its_own_is_refused(tmp_path: Path) -> None:
    path = write_shape(tmp_path / "model.gguf", replace(SHAPES["narrow"], architecture="bailingmoe3"))
    with pytest.raises(UsageError, match="bailingmoe3"):
        choose_types(open_model(path), MixChoice(MIXES["Q4_K_M"]))


def test_a_head_count_of_another_type_is_refused(tmp_path: Path) -> None:
    model = open_model(write_shape(tmp_path / "model.gguf", SHAPES["plain"]))
    key = f"{model.metadata['general.architecture']}.attention.head_count_kv"
    for value in ("many", float("nan")):
        odd = replace(model, metadata={**model.metadata, key: value})
        with pytest.raises(ModelFileError, match="head_count_kv': expected a whole number"):
            choose_types(odd, MixChoice(MIXES["Q4_K_M"]))
