"""Tests of the key `mmproj` of cluster files, and of the choice of a model's projector."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.launchers.models.projectors import open_with_projector
from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType
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
    with pytest.raises(UsageError, match="mmproj: cannot be set with `models`; give `mmproj` in the entries"):
        load(tmp_path, SEVERAL, "mmproj=p.gguf")


def test_mistakes_have_one_line(tmp_path: Path) -> None:
    for text in ("''", "[a]", "true", "3"):
        with pytest.raises(UsageError, match="mmproj") as caught:
            load(tmp_path, f"{ONE}mmproj: {text}\n")
        assert "\n" not in str(caught.value)


def chosen_of(text: Path, mmproj: str | None) -> tuple[Path | None, str | None]:
    model, unused = open_with_projector(text, mmproj)
    with model:
        return None if model.projector is None else model.projector.file.path, unused


def retype(path: Path, name: str, kind: QuantType) -> None:
    """Replaces a tensor by zeros of another type."""
    file = open_model(path)
    sources = [TensorSource(each.name, each.quant_type, each.shape, each.read) for each in file.tensors.values()]
    rows, columns = file.tensor(name).shape
    zeros = bytes(rows * kind.info.row_bytes(columns))
    changed = [
        TensorSource(name, kind, (rows, columns), lambda: zeros) if each.name == name else each for each in sources
    ]
    write_gguf(path.with_suffix(".new"), file.metadata, changed)
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize(
    ("tensor", "kind", "why"),
    [
        ("v.position_embd.weight", QuantType.Q4_0, "type Q4_0 is not supported; supported: F32, F16, BF16, Q8_0"),
        ("v.blk.1.attn_q.weight", QuantType.Q8_1, "type Q8_1 has no CPU kernels"),
    ],
)
def test_a_projector_that_no_worker_can_load_is_skipped_unless_it_is_given(
    tensor: str, kind: QuantType, why: str, tmp_path: Path
) -> None:
    text = build_tiny_model(tmp_path / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=1)
    bad = build_projector(text.with_name("mmproj-bad.gguf"), "idefics3")
    retype(bad, tensor, kind)
    path, hint = chosen_of(text, None)
    assert path is None and hint is not None and "\n" not in hint
    assert hint.startswith(f"images are not read: {bad}: tensor {tensor}: ") and why in hint
    good = build_projector(text.with_name("mmproj-good.gguf"), "idefics3")
    assert chosen_of(text, None) == (good, None)
    with pytest.raises(ModelFileError, match=why):
        chosen_of(text, str(bad))


def test_the_only_projector_beside_a_model_is_taken_unless_there_is_a_choice(tmp_path: Path) -> None:
    text = build_tiny_model(tmp_path / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=1)
    beside = build_projector(text.with_name("mmproj-m.gguf"), "idefics3")
    other = build_projector(tmp_path / "other.gguf", "gemma3")

    assert chosen_of(text, None) == (beside, None)
    assert chosen_of(text, "off") == (None, None)
    assert chosen_of(text, str(other)) == (other, None)
    build_projector(text.with_name("mmproj-n.gguf"), "idefics3")
    path, hint = chosen_of(text, None)
    assert path is None and hint is not None and "2 projectors fit" in hint
    assert chosen_of(text, str(beside)) == (beside, None) and chosen_of(text, "off") == (None, None)
    with pytest.raises(UsageError, match="no such file"):
        chosen_of(text, str(tmp_path / "nothing.gguf"))
    with pytest.raises(UsageError, match=r"run: llamaclust model pull hf:owner/name/mmproj-F16\.gguf"):
        chosen_of(text, "hf:owner/name/mmproj-F16.gguf")
    with pytest.raises(ModelFileError, match=r"a projector has 'clip'"):
        chosen_of(text, str(text))
