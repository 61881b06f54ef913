"""Prepares images in child processes, with bounds of bytes, pixels, time and memory."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import DeadlineError, RequestError
from llamaclust.model.child_process import (
    BoundedChild,
    ChildEndedError,
    ChildKilledError,
    ChildLateError,
    ChildProgram,
    ChildUnusableError,
)
from llamaclust.model.images.prompt import Piece, prompt_of
from llamaclust.model.images.settings import MAX_IMAGE_BYTES, ImageSettings

_CHILD: Final = "llamaclust.model.images.child"
_CHANNELS: Final = 3
PROCESSES: Final = 3
"""The number of child processes, so that two slow images do not hold up all others."""
_MAX_REPLY_BYTES: Final = 1 << 28

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of one image. `memory_bytes` is the memory of a child process above that at its start, `cpu_seconds` and
    `wall_s` bound its work, and `wait_s` the whole call, including the wait for earlier images."""

    max_bytes: int = MAX_IMAGE_BYTES
    max_pixels: int = 32 << 20
    memory_bytes: int = 300 << 20
    cpu_seconds: int = 15
    wall_s: float = 45.0
    start_s: float = 30.0
    wait_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ImageTiles:
    """`tiles` are RGB [height, width, 3], each the input of one run of the encoder. `prompt` is what stands for the
    image in the prompt: text, in which special tokens are written as text, and rows of the tiles."""

    tiles: tuple[NDArray[np.uint8], ...]
    prompt: tuple[Piece, ...]


class ImagePreparation:
    """The child processes of one projector's settings, which start on first use. Thread-safe."""

    def __init__(self, settings: ImageSettings, limits: ImageLimits | None = None) -> None:
        self._limits = limits or ImageLimits()
        self._preparers = [_Preparer(settings, self._limits) for _ in range(PROCESSES)]

    def __enter__(self) -> ImagePreparation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child processes. Images in progress and waiting ones fail. May be called again."""
        for preparer in self._preparers:
            preparer.child.stop()
        for preparer in self._preparers:
            preparer.child.close()

    def prepare(self, image: bytes) -> ImageTiles:
        """Raises RequestError for an image that is not taken, which another attempt does not change, and DeadlineError
        if the work is late, killed or closed."""
        future = self._submit(image)
        try:
            return future.result(self._limits.wait_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise self._waited_too_long() from None

    async def prepare_async(self, image: bytes) -> ImageTiles:
        future = asyncio.wrap_future(self._submit(image))
        try:
            return await asyncio.wait_for(future, self._limits.wait_s)
        except TimeoutError:
            raise self._waited_too_long() from None

    def _submit(self, image: bytes) -> Future[ImageTiles]:
        most = self._limits.max_bytes
        if len(image) > most:
            raise RequestError(f"the image has {len(image)} bytes; the limit is {most}: send a smaller one")
        return min(self._preparers, key=lambda preparer: preparer.child.load).submit(image)

    def _waited_too_long(self) -> DeadlineError:
        return DeadlineError(f"other images were prepared for {self._limits.wait_s:g} s; try again")


class _Preparer:
    def __init__(self, settings: ImageSettings, limits: ImageLimits) -> None:
        first = {"settings": asdict(settings), **asdict(limits)}
        program = ChildProgram(_CHILD, lambda: first, limits.start_s, limits.wall_s, _MAX_REPLY_BYTES)
        self.child = BoundedChild(program, "images")
        self._settings = settings
        self._limits = limits
        self._is_reported = False

    def submit(self, image: bytes) -> Future[ImageTiles]:
        return self.child.submit(partial(self._prepare, image))

    def _prepare(self, image: bytes) -> ImageTiles:
        try:
            reply, pixels = self.child.request_with_payload({}, image)
        except (ChildKilledError, ChildLateError, ChildUnusableError) as failure:
            raise DeadlineError(f"the preparation of the image was stopped: {failure}; try again") from None
        except ChildEndedError as failure:
            most = f"{self._limits.cpu_seconds} s of a processor and {self._limits.memory_bytes >> 20} MiB"
            raise RequestError(f"the image was refused: {failure}; the limit is {most}: send a smaller one") from None
        self._report(self.child.first_reply["unconfined"])
        if "error" in reply:
            raise RequestError(f"the image was refused: {_line(reply['error'])}")
        return _tiles(reply, pixels, self._settings)

    def _report(self, unconfined: str | None) -> None:
        if unconfined is not None and not self._is_reported:
            self._is_reported = True
            _log.warning("images are decoded with resource limits alone: %s", unconfined)


def _tiles(reply: dict[str, Any], pixels: bytes, settings: ImageSettings) -> ImageTiles:
    """Raises RequestError if the parts of a reply do not fit together: an image may have taken over the child."""
    try:
        sizes = [(int(width), int(height)) for width, height in reply["sizes"]]
        columns, rows = int(reply["columns"]), int(reply["rows"])
    except (KeyError, TypeError, ValueError):
        raise _damaged() from None
    counts = [width * height * _CHANNELS for width, height in sizes]
    is_cut = columns > 0 and rows > 0 and len(sizes) == columns * rows + 1
    is_whole = columns == rows == 0 and len(sizes) == 1
    if not (is_cut or is_whole) or min(map(min, sizes)) < 1 or sum(counts) != len(pixels):
        raise _damaged()
    ends = np.cumsum(counts)
    tiles = (
        np.frombuffer(pixels, np.uint8, count, end - count).reshape(height, width, _CHANNELS)
        for (width, height), count, end in zip(sizes, counts, ends, strict=True)
    )
    return ImageTiles(tuple(tiles), prompt_of(settings, sizes, columns, rows))


def _damaged() -> RequestError:
    return RequestError("the image was refused: its process gave a damaged reply; send another image")


def _line(text: object) -> str:
    return "".join(character for character in " ".join(str(text).split()) if character.isprintable())
