"""The choice of a model's projector: the given file, or the only one beside the model that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.config.values import OFF
from llamaclust.model.loader import Model
from llamaclust.model.projectors.beside import projectors_beside


def open_with_projector(
    path: Path, mmproj: str | None, chat_template: str | None = None, adapters: Sequence[Path] = ()
) -> Model:
    """Opens a model with its projector, if it has one. `mmproj` is the key of the cluster file. Raises the errors of
    `Model.open`, and UsageError if a given projector is not there."""
    given = None if mmproj in (None, OFF) else resolve_model(mmproj)
    model = Model.open(path, chat_template, adapters, given)
    if mmproj is None:
        model.projector = projectors_beside(model.file.path, model.check_projector).only
    return model


def unused_projectors(mmproj: str | None, model: Model) -> str | None:
    """Returns a hint that no projector beside the model is used, with the reason. None if one is used, or there is
    none, or the user wants none."""
    if mmproj is not None or model.projector is not None:
        return None
    return projectors_beside(model.file.path, model.check_projector).unused
