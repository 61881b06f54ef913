"""The choice of a model's projector: the given file, or the only one beside the model that fits and can be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.config.values import OFF
from llamaclust.cluster.control.stage_memory import check_encoder
from llamaclust.model.loader import Model
from llamaclust.model.projectors.beside import projectors_beside
from llamaclust.model.projectors.projector import Projector


def open_with_projector(
    path: Path, mmproj: str | None, chat_template: str | None = None, adapters: Sequence[Path] = ()
) -> tuple[Model, str | None]:
    """Opens a model with its projector, if it has one. `mmproj` is the key of the cluster file. Also returns the reason
    why no projector beside the model is used; None if one is used, none is there, or the user chose. Raises the errors
    of `Model.open` and `check_encoder`, and UsageError if a given projector is not there."""
    given = None if mmproj in (None, OFF) else resolve_model(mmproj)
    model = Model.open(path, chat_template, adapters, given)
    if model.projector is not None:
        check_encoder(model.projector)
    if mmproj is not None:
        return model, None

    def check(projector: Projector) -> None:
        model.check_projector(projector)
        check_encoder(projector)

    beside = projectors_beside(model.file.path, check)
    model.projector = beside.only
    return model, beside.unused
