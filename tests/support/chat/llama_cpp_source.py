"""Finds llama.cpp's tests and templates, or fetches them from llama-cpp-python's source package on PyPI."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
_VARIABLE = "LLAMACLUST_LLAMA_CPP"
_FOLDER = Path.home() / ".cache" / "llamaclust" / "suites" / "llama.cpp"
_NEEDED = ("tests/test-chat.cpp", "models/templates/")


def find_source() -> Path | None:
    """Returns the folder with `tests/` and `models/`: LLAMACLUST_LLAMA_CPP or the fetched one, or None."""
    folder = Path(os.environ.get(_VARIABLE) or _FOLDER)
    return folder if (folder / _NEEDED[0]).is_file() else None


def fetch_source() -> Path:
    """Downloads the package (some 60 MB) and keeps the needed files; raises CalledProcessError without a network."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run([*command, "-d", scratch, PACKAGE], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later have it.
            for member in archive.getmembers():
                inner = member.name.partition("/vendor/llama.cpp/")[2]
                if inner.startswith(_NEEDED) and member.isfile():
                    member.name = inner
                    archive.extract(member, _FOLDER)
    return _FOLDER


if __name__ == "__main__":
    print(fetch_source())
