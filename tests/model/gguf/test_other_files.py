"""Checks that files with a model's name and other contents are recognized."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.tools.progress import silent
from llamaclust.tools.split import SplitRules, plan_split, write_parts
from support.models.hostile_models import tiny


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("model.gguf", b"GGUF")
    return made.getvalue()


def _tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return made.getvalue()


def _safetensors() -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


FILES = {
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS", "git lfs pull"),
    "page": (b"\n<!doctype HTML><html>Log in", "a web page", "/resolve/"),
    "xml": (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "a web page", "/resolve/"),
    "error": (b'{"error": "Access to model x is restricted"}', "text in JSON", "download"),
    "safetensors": (_safetensors(), "safetensors", "model convert"),
    "zip": (_zip(), "a zip archive", "unpack"),
    "tar": (_tar(), "a tar archive", "unpack"),
    "gzip": (gzip.compress(b"GGUF"), "compressed by gzip", "unpack"),
    "pickle": (b"\x80\x02}q\x00.", "PyTorch", "model convert"),
    "ggml": (b"tjgg\x03\x00\x00\x00", "before GGUF", "as GGUF"),
    "nothing": (b"", "empty", "download"),
    "zeros": (bytes(4096), "filled with zeros", "download"),
    "text": (b"hello", "begins with b'hell'", "path of a .gguf"),
    "one byte": (b"G", "begins with b'G'", "path of a .gguf"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_error_names_the_kind_and_what_to_do(kind: str, tmp_path: Path) -> None:
    data, what, advice = FILES[kind]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as refused:
        open_model(path)
    message = str(refused.value)
    assert str(path) in message and "not a GGUF file" in message and what in message and advice in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["whole.gguf", "m-00001-of-00003.gguf"])
def test_joined_parts_of_a_split_model(name: str, tmp_path: Path) -> None:
    model = open_model(tiny(tmp_path / "tiny.gguf"))
    parts = plan_split(model, tmp_path / "m", SplitRules(most_tensors=20))
    write_parts(parts, silent)
    joined = b"".join(part.path.read_bytes() for part in parts)
    path = tmp_path / "joined" / name
    path.parent.mkdir()
    path.write_bytes(joined)
    with pytest.raises(ModelFileError, match=r"the parts were joined; .* `llamaclust model merge`"):
        open_model(path)
