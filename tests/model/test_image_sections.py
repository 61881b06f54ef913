"""Tests of programs of models that read images: rotation sections and positions of given rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.model.architectures import build_program
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from llamaclust.model.program import Add, Embed, GivenRows, Program, Rope, Scale
from llamaclust.model.steps.options import RopeStyle
from support.models.tiny_architectures import MODELS, build_architecture, build_tiny
from support.models.tiny_model import build_tiny_model


def program(path: Path) -> Program:
    with Model.open(path) as model:
        return build_program(model.file, 0, model.layer_count)


def sections_of(found: Program) -> set[tuple[int, ...] | None]:
    return {step.sections for step in found.steps if isinstance(step, Rope)}


def test_qwen2vl_is_qwen2_with_sections_in_runs(tmp_path: Path) -> None:
    sections = {"qwen2vl.rope.dimension_sections": np.array([4, 6, 5, 0], np.int32)}
    plain = program(build_tiny_model(tmp_path / "qwen2.gguf", architecture="qwen2"))
    found = program(build_tiny_model(tmp_path / "qwen2vl.gguf", architecture="qwen2vl", extra=sections))
    assert sections_of(found) == {(*[0] * 4, *[1] * 6, *[2] * 5, 0)}
    steps = (replace(step, sections=None) if isinstance(step, Rope) else step for step in found.steps)
    assert replace(found, steps=tuple(steps)) == plain


def test_sections_in_turn(tmp_path: Path) -> None:
    """Checks interleaved sections of 6, 5 and 5 pairs; the last pair belongs to time."""
    assert sections_of(program(build_architecture(tmp_path / "m.gguf", "qwen3vl"))) == {(*[0, 1, 2] * 5, 0)}


@pytest.mark.parametrize("name", ["glm4", "glm4moe"])
def test_texts_of_glm_have_sections_if_their_files_do(tmp_path: Path, name: str) -> None:
    """Checks that models with sections pair the two halves of a head, even GLM 4."""
    glm4 = replace(MODELS["chatglm"], architecture="glm4", post_norms=True)
    tiny = glm4 if name == "glm4" else MODELS[name]
    plain = program(build_tiny(tmp_path / "plain.gguf", tiny))
    none = np.zeros(4, np.int32)
    without = replace(tiny, keys={**tiny.keys, "rope.dimension_sections": none})
    assert program(build_tiny(tmp_path / "without.gguf", without)) == plain and plain.rope_sections == 0
    runs = np.array([1, 1, 2, 0], np.int32)
    turned = replace(tiny, keys={**tiny.keys, "rope.dimension_sections": runs})
    found = program(build_tiny(tmp_path / "turned.gguf", turned))
    assert sections_of(found) == {(0, 1, 2, 2)} and found.rope_sections == 3
    assert {step.style for step in found.steps if isinstance(step, Rope)} == {RopeStyle.NEOX}
    usual = RopeStyle.NORM if name == "glm4" else RopeStyle.NEOX
    assert {step.style for step in plain.steps if isinstance(step, Rope)} == {usual}


@pytest.mark.parametrize("name", ["qwen3vl", "qwen3vlmoe"])
def test_first_layers_add_levels_of_given_rows(tmp_path: Path, name: str) -> None:
    found = program(build_architecture(tmp_path / "m.gguf", name))
    given = [(step.level, step.adds) for step in found.steps if isinstance(step, GivenRows)]
    assert given == [(0, False), (1, True), (2, True)]
    assert (found.given_levels, found.given_width, found.rope_sections) == (3, found.hidden.width, 3)
    before = [type(found.steps[at - 1]) for at, step in enumerate(found.steps) if isinstance(step, GivenRows)]
    assert before == [Embed, Add, Add]
    cut = build_program(open_model(tmp_path / "m.gguf"), 1, 2)
    assert [(step.level, step.adds) for step in cut.steps if isinstance(step, GivenRows)] == [(2, True)]


@pytest.mark.parametrize("name", MODELS)
def test_given_rows_come_after_the_scaled_embedding(tmp_path: Path, name: str) -> None:
    found = program(build_architecture(tmp_path / "m.gguf", name))
    at = next(at for at, step in enumerate(found.steps) if isinstance(step, GivenRows))
    first = found.steps[at]
    assert isinstance(first, GivenRows) and (first.x, first.level, first.adds) == (first.out, 0, False)
    assert all(isinstance(step, Embed | Scale) for step in found.steps[:at])
    assert not isinstance(found.steps[at + 1], Scale)
