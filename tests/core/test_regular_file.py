"""Tests of text in users' files: encodings, and the position of bytes that are not text."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cli.chat.inserted_files import with_files
from llamaclust.cli.chat.sampling_options import _json_of
from llamaclust.cli.options import text_of
from llamaclust.cluster.config.document import read_document
from llamaclust.cluster.state.api_keys import first_key
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.regular_file import decode_text, read_given
from llamaclust.model.chat.template_choice import chosen_template
from llamaclust.model.checkpoints.json_file import read_json
from llamaclust.tools.evaluate.perplexity import read_text
from llamaclust.wire.security.token import read_private

ENCODINGS = {
    "UTF-8": (b"", "utf-8"),
    "UTF-8 with a mark": (codecs.BOM_UTF8, "utf-8"),
    "UTF-16, little end first": (codecs.BOM_UTF16_LE, "utf-16-le"),
    "UTF-16, big end first": (codecs.BOM_UTF16_BE, "utf-16-be"),
}
READERS: dict[str, tuple[Callable[[Path], Any], str, Any]] = {
    "cluster file": (lambda path: read_document(path).values, "name: größer 🦙", {"name": "größer 🦙"}),
    "API keys": (first_key, "# größer 🦙\nkey-12345", "key-12345"),
    "token": (read_private, "größer 🦙\n", "größer 🦙"),
    "system message": (text_of, "größer 🦙", "größer 🦙"),
    "JSON schema": (_json_of, '{"title": "größer 🦙"}', {"title": "größer 🦙"}),
    "text to evaluate": (read_text, "größer 🦙\n", "größer 🦙"),
    "chat template": (lambda path: chosen_template(str(path)), "größer 🦙", "größer 🦙"),
    "file in a message": (lambda path: with_files(f'@"{path}"'), "größer 🦙", "größer 🦙"),
    "settings of a checkpoint": (lambda path: read_json(path), '{"a": "größer 🦙"}', {"a": "größer 🦙"}),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.touch(mode=0o600)
    return file


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_the_same_encodings(reader: str, encoding: str, file: Path) -> None:
    read, text, expected = READERS[reader]
    mark, codec = ENCODINGS[encoding]
    file.write_bytes(mark + text.encode(codec))
    assert read(file) == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"key: one\nkey\xff: two\n", "byte 12 in line 2"),
        (b"key: one\n\nkey\0: two\n", "byte 13 in line 3"),
        (codecs.BOM_UTF8 + b"{\xc3(", "byte 4 in line 1"),
        ("key: one\nkey".encode("utf-16-le"), "byte 1 in line 1"),
        (codecs.BOM_UTF16_LE + "ab\0".encode("utf-16-le"), "byte 6 in line 1"),
        ("ab".encode("utf-32"), "byte 2 in line 1"),
        (codecs.BOM_UTF16_BE + b"\0a\xd8\x00\0b", "byte 4 in line 1"),
    ],
)
def test_every_reader_refuses_what_is_no_text_and_says_where(reader: str, data: bytes, place: str, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises((LlamaclustError, ValueError), match=place) as refused:
        READERS[reader][0](file)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_mark_inside_a_text_stays() -> None:
    assert decode_text(codecs.BOM_UTF8 + "a\ufeffb".encode()) == "a\ufeffb"


@pytest.mark.parametrize("most", [4, 100])
def test_given_files_and_pipes(tmp_path: Path, most: int) -> None:
    plain, pipe = tmp_path / "plain", tmp_path / "pipe"
    plain.write_bytes(b"some text")
    assert read_given(plain, most) == b"some text"[:most]
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no process writes to this pipe"):
        read_given(pipe, most)
    with pytest.raises(OSError):
        read_given(tmp_path, most)
    reading, writing = os.pipe()  # Like `<(...)` in a shell, the pipe is read before all data is written.
    with os.fdopen(reading, "rb"), os.fdopen(writing, "wb", buffering=0) as writer, ThreadPoolExecutor() as pool:
        found = pool.submit(read_given, Path(f"/dev/fd/{reading}"), most)
        for part in (b"some", b" text"):
            writer.write(part)
        writer.close()
        assert found.result(60) == b"some text"[:most]
