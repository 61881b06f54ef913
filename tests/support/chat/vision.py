"""A model that reads images, without a projector: each image has as many rows as its first byte says."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field

from llamaclust.cluster.front.text.images import ImageSource, PromptImages
from llamaclust.core.errors import RequestError
from support.clusters.served import ids

BEGIN, AFTER = tuple(ids("<")), tuple(ids(">"))


def image(rows: int, more: bytes = b"") -> bytes:
    return bytes([rows]) + more


def base64_of(data: bytes) -> str:
    return b64encode(data).decode()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64_of(data)}"


def laid_out(*pieces: str | bytes) -> tuple[int, ...]:
    """The token ids of a prompt of texts and images."""
    made: list[int] = []
    for piece in pieces:
        made += ids(piece) if isinstance(piece, str) else (*BEGIN, *[0] * piece[0], *AFTER)
    return tuple(made)


@dataclass
class TinyVision:
    """Remembers the prompts with images that it laid out."""

    prompts: list[PromptImages] = field(default_factory=list)

    async def lay_out(self, prompt: PromptImages) -> tuple[int, ...]:
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
