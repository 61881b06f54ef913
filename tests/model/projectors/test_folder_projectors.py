"""Tests of projectors beside a model's file, and of models opened with a projector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.adapters import read_adapter
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.loader import Model
from llamaclust.model.projectors.folder_projectors import projectors_beside
from llamaclust.model.projectors.projector import open_projector
from support.models.tiny_adapter import build_adapter
from support.models.tiny_encoders import build_encoder
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "text.gguf", hidden=TEXT_WIDTH, heads=4, layers=2)


def found(text: Path) -> tuple[list[str], str | None]:
    with Model.open(text) as model:
        beside = projectors_beside(text, model.check_projector)
    assert (beside.only is None) == (len(beside.fitting) != 1)
    return [projector.file.path.name for projector in beside.fitting], beside.unused


def test_only_projectors_that_fit_are_found(text: Path) -> None:
    assert found(text) == ([], None)
    build_projector(text.with_name("vision.bin"), "idefics3")
    build_tiny_model(text.with_name("mmproj-text.gguf"), hidden=TEXT_WIDTH, heads=4, layers=1)
    text.with_name("mmproj-notes.txt").write_text("GGUF")
    text.with_name("mmproj-folder.gguf").mkdir()
    names, unused = found(text)
    assert not names and unused is not None and "'mmproj-text.gguf' is not a projector" in unused and "llama" in unused
    text.with_name("mmproj-text.gguf").unlink()
    odd = text.with_name("mmproj-odd.gguf")
    write_gguf(odd, {"general.architecture": np.array([1, 2], np.uint32)}, [])
    assert "'mmproj-odd.gguf' is not a projector" in str(found(text)[1])
    odd.unlink()
    build_projector(text.with_name("mmproj-deep.gguf"), "qwen3vl_merger")
    names, unused = found(text)
    assert not names and unused is not None and "mmproj-deep.gguf" in unused and "rows for 2 first layers" in unused
    build_projector(text.with_name("MMPROJ-F16.gguf"), "idefics3")
    assert found(text) == (["MMPROJ-F16.gguf"], None)
    text.with_name("mmproj-a-broken.gguf").write_bytes(b"GGUF")
    assert found(text) == (["MMPROJ-F16.gguf"], None)
    build_projector(text.with_name("mmproj-model.gguf"), "idefics3")
    names, unused = found(text)
    assert names == ["MMPROJ-F16.gguf", "mmproj-model.gguf"]
    assert unused is not None and "2 projectors fit" in unused


def test_projectors_of_other_models_in_the_folder_are_no_problem(text: Path) -> None:
    build_projector(text.with_name("mmproj-deep.gguf"), "qwen3vl_merger")
    assert found(text)[1] is not None
    text.with_name("other.gguf").touch()
    assert found(text) == ([], None)
    build_projector(text.with_name("mmproj-1.gguf"), "idefics3")
    assert found(text) == (["mmproj-1.gguf"], None)
    build_projector(text.with_name("mmproj-2.gguf"), "idefics3")
    names, unused = found(text)
    assert len(names) == 2
    assert unused is not None and "2 projectors fit" in unused and "choose one with mmproj" in unused


def test_a_model_is_opened_with_its_projector(text: Path, tmp_path: Path) -> None:
    projector = build_projector(tmp_path / "p.gguf", "gemma3")
    adapter = build_adapter(tmp_path / "lora.gguf", text)
    with Model.open(text, mmproj=projector) as model:
        assert model.projector is not None and model.projector.name == "gemma3"
        assert model.adapted_by({0: read_adapter(adapter, model.plain)}).projector is model.projector
        assert model.widened.projector is model.projector
    with Model.open(text) as model:
        assert model.projector is None


def test_projectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    projector = build_projector(tmp_path / "p.gguf", "idefics3")
    with pytest.raises(ModelFileError, match=r"rows have 96 channels, but the text model's have 128"):
        Model.open(build_tiny_model(tmp_path / "wide.gguf", hidden=128), mmproj=projector)
    with pytest.raises(ModelFileError, match=r"images for architecture bert are not supported; set 'mmproj: off'"):
        Model.open(build_encoder(tmp_path / "bert.gguf", "bert"), mmproj=projector)
    text = build_tiny_model(tmp_path / "text.gguf", hidden=TEXT_WIDTH, heads=4, layers=1)
    turned = build_projector(tmp_path / "turned.gguf", "qwen2.5vl_merger")
    wide = build_tiny_model(tmp_path / "wide.gguf", hidden=open_projector(turned).width)
    with pytest.raises(ModelFileError, match=r"need the key rope.dimension_sections, which the model lacks; convert"):
        Model.open(wide, mmproj=turned)
    with pytest.raises(ModelFileError, match=r"general.architecture.*'llama', but a projector has 'clip'"):
        Model.open(text, mmproj=text)


@pytest.mark.parametrize(
    ("name", "rows"), [("idefics3", 16), ("gemma3", 4), ("gemma4v", 28), ("qwen2.5vl_merger", 4096), ("lfm2", 25)]
)
def test_the_most_rows_of_a_tile(name: str, rows: int, tmp_path: Path) -> None:
    """Checks that tiles of free size have the file's limit, or else the size of the learned positions."""
    assert open_projector(build_projector(tmp_path / "p.gguf", name)).max_rows == rows
