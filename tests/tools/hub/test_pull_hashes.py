"""Checks that a download has the hash that the user stated, and that nothing unprotected is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.config.catalog import locate
from llamaclust.core.errors import DownloadError, UsageError
from llamaclust.tools.hub.pull import pull_model
from support.hub.download_server import running_server

MODEL = b"GGUF" + bytes(9_996)
WRONG = f"#sha256={'0' * 64}"


def test_a_file_without_a_hash_is_not_taken_for_one_with_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        server.does.files["/m.gguf"] = MODEL
        pull_model(f"{server.url}/m.gguf", models_dir=tmp_path)
        with pytest.raises(DownloadError, match="SHA-256 is not"):
            pull_model(f"{server.url}/m.gguf{WRONG}", models_dir=tmp_path)


def test_parts_that_nothing_protects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one hash cannot check 3 files, and http does not protect them: use https"):
        pull_model(f"http://example.org/m-00001-of-00003.gguf{WRONG}", models_dir=tmp_path)


def test_files_of_one_name_in_a_package_have_folders_of_their_own() -> None:
    first, second = (locate(f"pypi:p==1/{folder}/m.gguf", Path("/models")) for folder in "ab")
    assert first != second
