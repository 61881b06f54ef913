"""Chooses the projector of a model: the given file, or the only usable projector in the model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.config.values import OFF
from llamaclust.model.loader import Model
from llamaclust.model.projectors.folder_projectors import projectors_beside
from llamaclust.model.projectors.projector import Projector, open_projector
from llamaclust.worker.devices.encoder_memory import encoder_bytes


def open_with_projector(
    path: Path, mmproj: str | None, chat_template: str | None = None, adapters: Sequence[Path] = ()
) -> tuple[Model, str | None]:
    """Returns a model with its projector, and the reason why a projector in the model's folder is unused, or None."""
    model = Model.open(path, chat_template, adapters)
    model.projector, unused = choose_projector(model, mmproj)
    return model, unused


def choose_projector(model: Model, mmproj: str | None) -> tuple[Projector | None, str | None]:
    """Returns the projector, and the reason why a projector in the model's folder is unused. Either may be None. Raises
    UsageError if a given projector is missing, and ModelFileError if it is damaged or does not fit the model."""

    def check(projector: Projector) -> None:
        model.check_projector(projector)
        encoder_bytes(projector, 1)  # Raises ModelFileError if there are no kernels for the encoder.

    if mmproj == OFF:
        return None, None
    if mmproj is not None:
        given = open_projector(resolve_model(mmproj))
        check(given)
        return given, None
    beside = projectors_beside(model.file.path, check)
    return beside.only, beside.unused
