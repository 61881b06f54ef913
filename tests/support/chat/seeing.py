"""Vision of a model with a tiny projector, whose encoder runs in this process."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from llamaclust.cluster.front.text.image_rows import RowCache, RowLeases, RowLimits, Rows
from llamaclust.cluster.front.text.images import ImageSource, PromptImages
from llamaclust.cluster.front.text.vision import Tile, Vision
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.sharing.computations import Owners
from llamaclust.core.sharing.turns import Turns
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.images.preparation import ImagePreparation
from llamaclust.model.projectors.projector import Projector, open_projector
from support.clusters.served import ids, tokenizer
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import build_projector

BEFORE, BETWEEN = tuple(ids("look: ")), tuple(ids(" and "))
QUICK = "idefics3"


def png(seed: int, width: int = 44, height: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@dataclass
class Encoder:
    """An encoder in this process that counts images and waits while a test keeps `gate` closed."""

    path: Path
    images: int = 0
    turns: Turns = field(default_factory=lambda: Turns(sys.maxsize, 1))  # one image of each owner at a time
    owners: list[list[str]] = field(default_factory=list)  # of each image at its start
    failure: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        async with self.turns.turn(owner):
            yield

    async def encode(self, tiles: Sequence[Tile], owners: Owners) -> list[Rows]:
        self.images += 1
        self.owners.append([*owners])
        self.begun.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise self.failure
        return [encoded(ReferenceBackend(), self.path, tile) for tile in tiles]


def any_length(_: int) -> None:
    pass


@asynccontextmanager
async def seeing(
    folder: Path, name: str = QUICK, sections: int = 0, limits: RowLimits | None = None
) -> AsyncIterator[tuple[Vision, Encoder, Projector]]:
    path = build_projector(folder / f"{name}.gguf", name)
    projector, encoder = open_projector(path), Encoder(path)
    async with ImagePreparation() as preparation:
        vision = Vision(projector, tokenizer(), encoder, preparation, sections, RowCache(limits))
        yield vision, encoder, projector


def prompt_of(*images: bytes, detail: str = "auto") -> PromptImages:
    pieces = [piece for image in images for piece in (ImageSource(image, detail), BETWEEN)]
    return PromptImages((BEFORE, *pieces))


async def spans_of(vision: Vision, *images: bytes, leases: RowLeases | None = None) -> tuple[ImageSpan, ...]:
    """Returns the spans of images in a prompt; without `leases`, the leases end at once."""
    with RowLeases() as own:
        return (await vision.image_prompt(prompt_of(*images), any_length, leases or own))[1]
