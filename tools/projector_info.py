"""Describes a projector file for `model info`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamaclust.cluster.launchers.models.projectors import open_with_projector
from llamaclust.core.sizes import needed
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.hyperparameters import PROJECTOR_ARCHITECTURE
from llamaclust.model.model_keys import read_architecture
from llamaclust.model.projectors.projector import Projector, projector_of
from llamaclust.worker.devices.encoder_limits import EncoderMemory
from llamaclust.worker.devices.encoder_memory import encoder_bytes


@dataclass(frozen=True, slots=True)
class ProjectorInfo:
    """Sizes of a projector. `width` is the number of channels of an image embedding. `image_size` is the side of a tile
    in pixels, or 0 if tiles may have any size up to `max_pixels` pixels."""

    name: str
    width: int
    deepstack_levels: int
    layers: int
    patch_size: int
    merge: int
    image_size: int
    max_pixels: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        deepstack = f", and for its first {self.deepstack_levels} layers" if self.deepstack_levels else ""
        tiles = f"of {self.image_size} x {self.image_size}" if self.image_size else f"of up to {self.max_pixels:,}"
        return (
            f"projector {self.name}: an encoder of images with {self.layers} layers",
            f"  rows of {self.width} channels for the text model{deepstack}",
            f"  patches of {self.patch_size} x {self.patch_size} pixels, {self.merge} x {self.merge} of them in a row",
            f"  tiles {tiles} pixels",
        )


@dataclass(frozen=True, slots=True)
class ProjectorBeside:
    path: Path | None = None
    info: ProjectorInfo | None = None
    weight_bytes: int = 0
    workspace_bytes: int = 0
    unused: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": None if self.path is None else str(self.path)}

    def lines(self) -> tuple[str, ...]:
        if self.path is None or self.info is None:
            return (f"beside it: {self.unused}",)
        memory = needed(EncoderMemory(self.weight_bytes, self.workspace_bytes).parts)
        return f"beside it: {self.path.name}", *self.info.lines(), f"  in memory: {memory}"


def is_projector(file: ModelFile) -> bool:
    return read_architecture(file) == PROJECTOR_ARCHITECTURE


def describe_projector(file: ModelFile) -> ProjectorInfo:
    return _info(projector_of(file))


def _info(projector: Projector) -> ProjectorInfo:
    is_fixed = projector.family.tokens is None
    return ProjectorInfo(
        name=projector.name,
        width=projector.width,
        deepstack_levels=projector.levels - 1,
        layers=projector.hyperparameters.block_count,
        patch_size=projector.patch_size,
        merge=projector.merge,
        image_size=projector.images.image_size if is_fixed else 0,
        max_pixels=0 if is_fixed else projector.images.max_pixels,
    )


def projector_beside(model: Path, threads: int) -> ProjectorBeside | None:
    """Returns the projector next to a model, or None. Raises ModelFileError if the model cannot run."""
    opened, unused = open_with_projector(model, None)
    opened.close()
    projector = opened.projector
    if projector is None:
        return None if unused is None else ProjectorBeside(unused=unused)
    memory = encoder_bytes(projector, threads)
    return ProjectorBeside(projector.file.path, _info(projector), memory.weight_bytes, memory.workspace_bytes)
