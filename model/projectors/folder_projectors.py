"""Projector files in the same folder as a model file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.header import read_header
from llamaclust.model.gguf.model_file import PART_NAME
from llamaclust.model.gguf.values import shown, text_of
from llamaclust.model.hyperparameters import PROJECTOR_ARCHITECTURE
from llamaclust.model.projectors.projector import Projector, open_projector

_PREFIX = "mmproj"
_MOST_FILES = 32
_MOST_SHOWN = 4


@dataclass(frozen=True, slots=True)
class FolderProjectors:
    """The projectors in a model file's folder. `fitting` has those that fit the model, and `problems` has the
    reasons why the others do not fit."""

    fitting: tuple[Projector, ...]
    problems: tuple[str, ...]

    @property
    def only(self) -> Projector | None:
        return self.fitting[0] if len(self.fitting) == 1 else None

    @property
    def unused(self) -> str | None:
        """The reason why no projector is used. None if one is used, or if the folder has no projectors."""
        if len(self.fitting) > 1:
            names = [shown(projector.file.path.name) for projector in self.fitting]
            more = ", ..." if len(names) > _MOST_SHOWN else ""
            listed = ", ".join(names[:_MOST_SHOWN])
            return f"images are not read, because {len(names)} projectors fit: {listed}{more}; choose one with mmproj"
        return None if self.fitting or not self.problems else f"images are not read: {self.problems[0]}"


def is_named_projector(path: PurePath) -> bool:
    return path.name.lower().startswith(_PREFIX)


def projectors_beside(model: Path, check: Callable[[Projector], None]) -> FolderProjectors:
    """Opens the projectors in a model's folder. `check` must raise ModelFileError for a projector that does not fit."""
    fitting, problems = [], []
    for path in _files(model):
        try:
            architecture = text_of(read_header(path).metadata, "general.architecture")
            if architecture != PROJECTOR_ARCHITECTURE:
                problems.append(
                    f"{shown(path.name)} is not a projector: its architecture is {shown(architecture or '')}"
                )
                continue
            projector = open_projector(path)
            check(projector)
            fitting.append(projector)
        except ModelFileError as error:
            problems.append(str(error))
    return FolderProjectors(tuple(fitting), () if _has_other_models(model) else tuple(problems))


def _files(model: Path) -> list[Path]:
    return [path for path in _ggufs(model) if is_named_projector(path) and path.is_file()][:_MOST_FILES]


def _has_other_models(model: Path) -> bool:
    part = PART_NAME.fullmatch(model.name)
    others = (path.name for path in _ggufs(model) if not is_named_projector(path))
    return any(part is None or not name.startswith(part["stem"]) for name in others)


def _ggufs(model: Path) -> list[Path]:
    try:
        return sorted(path for path in model.parent.iterdir() if path.suffix.lower() == ".gguf" and path != model)
    except OSError:
        return []
