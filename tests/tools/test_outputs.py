"""Checks that input files and special files are never replaced by outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamaclust.cli.models.quantize import imatrix
from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.atomic_file import new_file
from llamaclust.tools.convert.conversion import convert
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.evaluate.perplexity import read_text
from support.models.checkpoint_files import write_hugging_face
from support.models.random_checkpoints import checkpoint
from support.models.tiny_tokenizers import tokenizer_json


def converted(source: Path, out: Path) -> None:
    convert(source, out, "f32", Hints(), lambda done, total: None, None)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_conversion_replaces_nothing_that_it_reads(name: str, tmp_path: Path) -> None:
    model = write_hugging_face(tmp_path / "m", *checkpoint("LlamaForCausalLM"))
    (model / "tokenizer.json").write_text(tokenizer_json())
    before = (model / name).read_bytes()
    with pytest.raises(UsageError, match="already exists and is not a model file"):
        converted(model, model / name)
    assert (model / name).read_bytes() == before
    for _ in range(2):  # a model file may be replaced
        converted(model, model / "out.gguf")


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"), new_file(tmp_path / "pipe", 0):
        raise AssertionError("nothing is written")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_an_importance_matrix_replaces_neither_its_model_nor_its_text(tmp_path: Path) -> None:
    model, text = tmp_path / "model.gguf", tmp_path / "text"
    model.write_bytes(b"GGUF")
    text.write_text("x")
    (tmp_path / "link").symlink_to(model)
    for out in (model, text, tmp_path / "link"):
        with pytest.raises(UsageError, match="is also an input file"):
            imatrix(model, text, out)


def test_a_device_is_no_text() -> None:
    """Checks a device; some devices never end."""
    with pytest.raises(UsageError, match="not a text file"):
        read_text(Path("/dev/null"))
