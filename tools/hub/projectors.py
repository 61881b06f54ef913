from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

from llamaclust.model.projectors.folder_projectors import is_named_projector

_TYPES: Final = tuple(re.compile(rf"(?<![a-z0-9]){name}$") for name in ("f16", "q8_0", "bf16", "f32"))
"""File name endings (without .gguf), in order of preference. F16 is first, as it is as accurate as the checkpoints."""


def projector_in(files: Iterable[str], model: str) -> str | None:
    """Returns the path of the projector for the model at the path `model`, or None. `files` are all paths in the
    repository."""
    place = PurePosixPath(model)
    folders = [*place.parents]
    paths = (PurePosixPath(file) for file in files if is_named_projector(PurePosixPath(file)))
    found = [path for path in paths if path != place and path.suffix.lower() == ".gguf" and path.parent in folders]
    return str(min(found, key=lambda path: (folders.index(path.parent), _rank(path), path))) if found else None


def _rank(path: PurePosixPath) -> int:
    stem = path.stem.lower()
    return next((rank for rank, pattern in enumerate(_TYPES) if pattern.search(stem)), len(_TYPES))
