"""Figures of a projector file for `model info`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.hyperparameters import read_architecture
from llamaclust.model.projectors.keys import ARCHITECTURE
from llamaclust.model.projectors.projector import projector_of


@dataclass(frozen=True, slots=True)
class ProjectorInfo:
    """`width` is the number of channels of a row. `image_size` is the side of a tile in pixels, or 0 if tiles may have
    any size up to `max_pixels`."""

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


def is_projector(file: ModelFile) -> bool:
    return read_architecture(file) == ARCHITECTURE


def describe_projector(file: ModelFile) -> ProjectorInfo:
    """Raises ModelFileError for a projector that is not supported."""
    projector = projector_of(file)
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
