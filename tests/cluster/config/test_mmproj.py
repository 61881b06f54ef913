"""The key `mmproj` of cluster files, and the choice of a model's projector."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.config.projectors import open_with_projector, unused_projectors
from llamaclust.core.errors import ModelFileError, UsageError
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

ONE = "model: m.gguf\nworkers: [{name: a}]\n"
SEVERAL = """
models: [{model: m.gguf, mmproj: p.gguf}, {model: n.gguf, mmproj: off}, {model: o.gguf}]
workers: [{name: a}]
"""


def load(folder: Path, text: str, *overrides: str) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("auto", None),
        ("off", "off"),
        ("'off'", "off"),
        ("false", "off"),
        ("p.gguf", "FOLDER/p.gguf"),
        ("/models/p.gguf", "/models/p.gguf"),
        ("hf:owner/name/mmproj-F16.gguf", "hf:owner/name/mmproj-F16.gguf"),
    ],
)
def test_it_is_a_file_or_a_word(text: str, found: str | None, tmp_path: Path) -> None:
    config = load(tmp_path, f"{ONE}mmproj: {text}\n")
    assert config.mmproj == (found and found.replace("FOLDER", str(tmp_path)))
    assert load(tmp_path, ONE).mmproj is None
    assert load(tmp_path, f"{ONE}mmproj: {text}\n", "mmproj=off").mmproj == "off"


def test_each_of_several_models_has_its_own(tmp_path: Path) -> None:
    config = load(tmp_path, SEVERAL)
    assert [own.mmproj for own in config.of_each_model()] == [str(tmp_path / "p.gguf"), "off", None]
    with pytest.raises(UsageError, match=r"mmproj: is for one model: give `mmproj` among `models`"):
        load(tmp_path, SEVERAL, "mmproj=p.gguf")


def test_mistakes_have_one_line(tmp_path: Path) -> None:
    for text in ("''", "[a]", "true", "3"):
        with pytest.raises(UsageError, match="mmproj") as caught:
            load(tmp_path, f"{ONE}mmproj: {text}\n")
        assert "\n" not in str(caught.value)


def test_the_only_projector_beside_a_model_is_taken_unless_there_is_a_choice(tmp_path: Path) -> None:
    text = build_tiny_model(tmp_path / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=1)
    beside = build_projector(text.with_name("mmproj-m.gguf"), "idefics3")
    other = build_projector(tmp_path / "other.gguf", "gemma3")

    def chosen(mmproj: str | None) -> tuple[Path | None, str | None]:
        with open_with_projector(text, mmproj) as model:
            path = None if model.projector is None else model.projector.file.path
            return path, unused_projectors(mmproj, model)

    assert chosen(None) == (beside, None)
    assert chosen("off") == (None, None)
    assert chosen(str(other)) == (other, None)
    build_projector(text.with_name("mmproj-n.gguf"), "idefics3")
    path, hint = chosen(None)
    assert path is None and hint is not None and "2 projectors fit" in hint
    assert chosen(str(beside)) == (beside, None) and chosen("off") == (None, None)
    with pytest.raises(UsageError, match="no such file"):
        chosen(str(tmp_path / "nothing.gguf"))
    with pytest.raises(UsageError, match=r"run: llamaclust model pull hf:owner/name/mmproj-F16\.gguf"):
        chosen("hf:owner/name/mmproj-F16.gguf")
    with pytest.raises(ModelFileError, match=r"a projector has 'clip'"):
        chosen(str(text))
