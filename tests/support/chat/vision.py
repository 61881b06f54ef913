"""Vision without a projector: the first byte of an image is its number of rows."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256

import numpy as np

from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.images import ImageSource, PromptImages
from llamaclust.cluster.front.text.vision import CheckLength, ImagePrompt, Vision
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.errors import RequestError
from support.clusters.served import ids

WIDTH = 8
BEGIN, AFTER = tuple(ids("<")), tuple(ids(">"))


def image(rows: int, more: bytes = b"") -> bytes:
    return bytes([rows]) + more


def base64_of(data: bytes) -> str:
    return b64encode(data).decode()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64_of(data)}"


def laid_out(*pieces: str | bytes) -> tuple[int, ...]:
    """Returns the token ids of a prompt of texts and images."""
    made: list[int] = []
    for piece in pieces:
        made += ids(piece) if isinstance(piece, str) else (*BEGIN, *[0] * piece[0], *AFTER)
    return tuple(made)


class TinyVision(Vision):
    """Vision without an encoder that records its prompts with images."""

    def __init__(self, *, width: int = WIDTH) -> None:
        self.prompts: list[PromptImages] = []
        self.leases: list[int] = []  # held by requests
        self.leased = 0  # number so far
        self._width = width

    def _end_lease(self) -> None:
        self.leases.pop()

    async def image_prompt(self, prompt: PromptImages, check: CheckLength, leases: RowLeases) -> ImagePrompt:
        ids, spans = await self.lay_out(prompt, check), []
        self.leases.append(len(self.prompts))
        leases.add(self._end_lease)
        self.leased += 1
        starts = [at for at in range(len(ids)) if ids[at] == 0 and (not at or ids[at - 1])]
        for start, image in zip(starts, self.images[-len(starts) :] if starts else (), strict=True):
            rows = np.full((image.data[0], self._width), image.data[0], np.float32)
            spans.append(ImageSpan(start, start + len(rows), rows, sha256(image.data).digest()))
        return ids, tuple(spans)

    async def lay_out(self, prompt: PromptImages, check: CheckLength) -> tuple[int, ...]:
        self.prompts.append(prompt)
        made: list[int] = []
        for piece in prompt.pieces:
            if isinstance(piece, ImageSource):
                if not piece.data[0]:
                    raise RequestError("an image is in no format that is read here")
                made += (*BEGIN, *[0] * piece.data[0], *AFTER)
            else:
                made += piece
        return tuple(made)

    @property
    def images(self) -> list[ImageSource]:
        return [piece for prompt in self.prompts for piece in prompt.pieces if isinstance(piece, ImageSource)]
