from __future__ import annotations

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".cmake", ".proto", ".toml", ".txt")
_NO_SOURCES = ("build", "dist", "docs", "__pycache__", "shared")


def sources_digest(root: Path) -> str:
    """Hashes the files that steps run or compile. A commit is not enough, because copied trees often have no .git."""
    digest = hashlib.sha256()
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in _NO_SOURCES and not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
