"""Prepares images in child processes, with limits on bytes, pixels, time and memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import DeadlineError, RequestError
from llamaclust.core.sharing.turns import Turns
from llamaclust.model.child_process import (
    BoundedChild,
    ChildEndedError,
    ChildKilledError,
    ChildLateError,
    ChildProgram,
    ChildUnusableError,
)
from llamaclust.model.images.families.family import Piece
from llamaclust.model.images.prompt import prompt_of
from llamaclust.model.images.settings import CHANNELS, MAX_IMAGE_BYTES, ImageSettings

_CHILD: Final = "llamaclust.model.images.child"
_PROCESSES: Final = 3
_MOST_OF_AN_OWNER: Final = 2
"""The maximum number of images that are prepared at the same time for one owner."""
_MAX_LINE_BYTES: Final = 1 << 16
_MAX_ERROR_CHARACTERS: Final = 300

_log = logging.getLogger(__name__)


class RefusedImageError(RequestError):
    """An image cannot be decoded, or exceeds a limit."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of image preparation. A child process's memory may grow by `memory_bytes`. `cpu_seconds` and `wall_s`
    limit its work, and `wait_s` limits the wait for earlier images. An idle process ends after `idle_s`."""

    max_bytes: int = MAX_IMAGE_BYTES
    max_pixels: int = 32 << 20
    memory_bytes: int = 300 << 20
    cpu_seconds: int = 15
    wall_s: float = 45.0
    start_s: float = 30.0
    wait_s: float = 60.0
    idle_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ImageTiles:
    """The RGB tiles [height, width, 3] of an image, and the pieces of text and embedding rows that stand for it in the
    prompt."""

    tiles: tuple[NDArray[np.uint8], ...]
    prompt: tuple[Piece, ...]


class ImagePreparation:
    """The child processes that prepare images. They start on first use and end when idle. Must be used on one event
    loop."""

    def __init__(self, limits: ImageLimits | None = None) -> None:
        self._limits = limits or ImageLimits()
        self._preparers = [_Preparer(self._limits) for _ in range(_PROCESSES)]
        self._turns = Turns(_PROCESSES, _MOST_OF_AN_OWNER)

    async def __aenter__(self) -> ImagePreparation:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        for preparer in self._preparers:
            preparer.child.stop()
        for preparer in self._preparers:
            preparer.child.close()

    async def prepare(self, image: bytes, settings: ImageSettings, owner: str = "") -> ImageTiles:
        async with self.turn(owner):
            return await self.tiles(image, settings)

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Waits until the owner may prepare an image. Raises DeadlineError if other images take too long."""
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(self._limits.wait_s):
                    await turn.enter_async_context(self._turns.turn(owner))
            except TimeoutError:
                what = f"other images were prepared for {self._limits.wait_s:g} s"
                raise DeadlineError(f"{what}; try again") from None
            yield

    async def tiles(self, image: bytes, settings: ImageSettings) -> ImageTiles:
        """Prepares an image. Callers must hold a `turn`. Raises RefusedImageError, or DeadlineError if the work takes
        too long or is stopped. If cancelled, waits until the work has ended."""
        most = self._limits.max_bytes
        if len(image) > most:
            raise RefusedImageError(f"the image has {len(image)} bytes; the limit is {most}: send a smaller image")
        work = asyncio.wrap_future(self._least_busy().submit(image, settings))
        try:
            return await asyncio.shield(work)
        finally:
            await asyncio.wait([work])

    def _least_busy(self) -> _Preparer:
        return min(self._preparers, key=lambda preparer: (preparer.child.load, preparer.child.pid is None))


class _Preparer:
    def __init__(self, limits: ImageLimits) -> None:
        first = asdict(limits)
        program = ChildProgram(
            _CHILD, lambda: first, limits.start_s, limits.wall_s, _MAX_LINE_BYTES, idle_s=limits.idle_s
        )
        self.child = BoundedChild(program, "images")
        self._limits = limits
        self._is_reported = False

    def submit(self, image: bytes, settings: ImageSettings) -> Future[ImageTiles]:
        return self.child.submit(partial(self._prepare, image, settings))

    def _prepare(self, image: bytes, settings: ImageSettings) -> ImageTiles:
        try:
            reply, pixels = self.child.request_with_payload(asdict(settings), image, settings.max_tile_bytes)
        except (ChildKilledError, ChildLateError, ChildUnusableError) as failure:
            raise DeadlineError(f"the preparation of the image was stopped: {failure}; try again") from None
        except ChildEndedError as failure:
            most = f"{self._limits.cpu_seconds} s of CPU time and {self._limits.memory_bytes >> 20} MiB"
            raise RefusedImageError(
                f"the image was refused: {failure}; the limit is {most}: send a smaller image"
            ) from None
        self._report(self.child.first_reply["unconfined"])
        if "error" in reply:
            raise RefusedImageError(f"the image was refused: {_line(reply['error'])}")
        return _tiles(reply, pixels, settings)

    def _report(self, unconfined: str | None) -> None:
        if unconfined is not None and not self._is_reported:
            self._is_reported = True
            _log.warning("images are decoded with resource limits alone: %s", unconfined)


def _tiles(reply: dict[str, Any], pixels: bytes, settings: ImageSettings) -> ImageTiles:
    """Converts a child's reply. Raises RefusedImageError for an inconsistent reply, as of a malicious image."""
    try:
        sizes = [(int(width), int(height)) for width, height in reply["sizes"]]
        columns, rows = int(reply["columns"]), int(reply["rows"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _damaged() from None
    counts = [width * height * CHANNELS for width, height in sizes]
    is_cut = columns > 0 and rows > 0 and len(sizes) == columns * rows + 1
    is_whole = columns == rows == 0 and len(sizes) == 1
    if not (is_cut or is_whole) or min(map(min, sizes)) < 1 or sum(counts) != len(pixels):
        raise _damaged()
    ends = np.cumsum(counts)
    tiles = (
        np.frombuffer(pixels, np.uint8, count, end - count).reshape(height, width, CHANNELS)
        for (width, height), count, end in zip(sizes, counts, ends, strict=True)
    )
    return ImageTiles(tuple(tiles), prompt_of(settings, sizes, columns, rows))


def _damaged() -> RefusedImageError:
    return RefusedImageError("the image was refused: the child process sent an invalid reply; send another image")


def _line(text: object) -> str:
    words = " ".join(str(text).split())[:_MAX_ERROR_CHARACTERS]
    return "".join(character for character in words if character.isprintable())
