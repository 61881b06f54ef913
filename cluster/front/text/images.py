"""Images in prompts: parts of messages, and prompts that consist of token ids and images."""

from __future__ import annotations

import json
import re
from binascii import a2b_base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Final

from llamaclust.core.errors import ParameterError

MAX_IMAGES: Final = 64
MAX_IMAGES_BYTES: Final = 32 << 20

MEDIA_MARKER: Final = f"<__media_{token_hex(16)}__>"
"""llama.cpp's placeholder for an image, shown by `GET /props`. It is random, so no text contains it by accident."""
PLAIN_MARKER: Final = "<__media__>"
"""Placeholder of older llama.cpp versions. It is used in prompts without a random marker."""
_RANDOM_MARKER: Final = re.compile(r"<__media_[0-9a-f]{32}__>")

DETAILS: Final = ("auto", "low", "high", "original")
"""OpenAI's levels of detail of an image."""

_STEP: Final = 1 << 18  # Number of base64 characters to decode at a time, a multiple of 4.
Part = str | dict[str, Any]
"""A part of a message. It is a text, or an image in OpenAI's form."""


class Omission(str):
    """A text that replaces a part of a message that the model cannot read. `joined` keeps it apart from other texts."""

    __slots__ = ()


Content = str | list[dict[str, Any]]
"""Content of a message. If it has images, it is a list of OpenAI parts of the types `text` and `image_url`."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    data: bytes = field(repr=False)
    detail: str = "auto"  # One of `DETAILS`.


@dataclass(frozen=True, slots=True)
class PromptImages:
    pieces: tuple[tuple[int, ...] | ImageSource, ...]

    @property
    def sources(self) -> Iterator[ImageSource]:
        return (piece for piece in self.pieces if isinstance(piece, ImageSource))

    @property
    def least_tokens(self) -> int:
        return sum(1 if isinstance(piece, ImageSource) else len(piece) for piece in self.pieces)


def media_marker(prompt: str, images: int) -> str:
    """Returns the text that stands for an image in `prompt`. Restored prompts have an earlier coordinator's marker."""
    if MEDIA_MARKER in prompt:
        return MEDIA_MARKER
    counts = Counter(_RANDOM_MARKER.findall(prompt))
    return next((marker for marker, count in counts.items() if count == images), PLAIN_MARKER)


def image_part(url: str, detail: str = "auto") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def joined(parts: Sequence[Part]) -> Content:
    """Makes the content of a message from texts and images. If there are no images, line breaks join the texts. The
    content is an `Omission` if the model can read none of its parts."""
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        is_omitted = any(isinstance(text, Omission) for text in texts)
        has_text = any(text.strip() and not isinstance(text, Omission) for text in texts)
        return Omission("\n".join(texts)) if is_omitted and not has_text else "\n".join(texts)
    return [text_part(part) if isinstance(part, str) else part for part in parts]


def parts_of(content: Content) -> list[Part]:
    if isinstance(content, str):
        return [content]
    return [part["text"] if part["type"] == "text" else part for part in content]


def image_urls(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


class ImageMarkers:
    """Random texts that replace the images of a chat while its template is rendered. They are alphanumeric."""

    def __init__(self) -> None:
        self._word = f"image{token_hex(16)}n"
        self._pattern = re.compile(rf"{self._word}(\d+)e")
        self._parts: list[dict[str, Any]] = []

    def mark(
        self, messages: Iterable[Mapping[str, Any]], *, keeps_texts: bool = False
    ) -> tuple[Mapping[str, Any], ...]:
        """Replaces images with markers, so that the content of each message becomes one text. If `keeps_texts`,
        contents without images stay lists of parts."""
        return tuple(
            {**each, "content": self._text(content)}
            if isinstance(content := each.get("content"), list) and not (keeps_texts and _are_texts(content))
            else each
            for each in messages
        )

    def _text(self, content: Sequence[Mapping[str, Any]]) -> str:
        text, is_after_text = "", False
        for part in content:
            is_text = part["type"] == "text"
            if is_text:
                text += f"\n{part['text']}" if is_after_text else part["text"]
            else:
                text += f"{self._word}{len(self._parts)}e"
                self._parts.append(dict(part))
            is_after_text = is_text
        return text

    def split(self, rendered: str) -> list[Part]:
        """Splits a prompt into texts and images, beginning with a text. Raises ParameterError if an image is
        missing."""
        first, *others = self._pattern.split(rendered)
        numbers, texts = [*map(int, others[::2])], others[1::2]
        if missing := len(self._parts) - len({*numbers}):
            reason = f"the model's chat template leaves out {missing} of {len(self._parts)} images"
            raise ParameterError("messages", f"{reason}; put images into messages of the role user")
        pieces: list[Part] = [first]
        for number, text in zip(numbers, texts, strict=True):
            pieces += [self._parts[number], text] if text else [self._parts[number]]
        return pieces

    def public(self, rendered: str) -> str:
        return self._pattern.sub(MEDIA_MARKER, rendered)


def own_fields(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the different fields of texts that chat templates may know, such as the languages of a translation."""
    contents = (message.get("content") for message in messages)
    texts = (part for each in contents if isinstance(each, list) and _are_texts(each) for part in each)
    fields = ({key: value for key, value in part.items() if key not in ("type", "text")} for part in texts)
    return [*{json.dumps(each, sort_keys=True): each for each in fields if each}.values()]


def _are_texts(parts: Sequence[Mapping[str, Any]]) -> bool:
    return all(part["type"] == "text" for part in parts)


def source_of(part: Mapping[str, Any], images: Mapping[str, bytes]) -> ImageSource:
    image = part["image_url"]
    url = image["url"]
    return ImageSource(images[url] if url in images else _decoded(url.partition(",")[2]), image["detail"])


def _decoded(data: str) -> bytes:
    """Decodes base64 in steps, so that other threads can run."""
    return b"".join(a2b_base64(data[start : start + _STEP]) for start in range(0, len(data), _STEP))
