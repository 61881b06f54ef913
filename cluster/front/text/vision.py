"""Converts prompts with images to token ids and image rows, for models with a projector."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.front.text.image_rows import RowCache, RowLeases, RowMemoryError, Rows
from llamaclust.cluster.front.text.images import DETAILS, ImageSource, PromptImages
from llamaclust.cluster.front.text.prefetch import Prefetch
from llamaclust.cluster.front.text.sharing import TOKENIZING, current_owner, run_on
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.sharing.computations import Lease, Owners, SharedComputations
from llamaclust.core.sharing.line import Place
from llamaclust.model.chat.prompt import encode_text
from llamaclust.model.images.families.family import TileRows
from llamaclust.model.images.preparation import ImagePreparation, ImageTiles
from llamaclust.model.images.projector_settings import low_detail, settings_of
from llamaclust.model.images.settings import ImageSettings
from llamaclust.model.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamaclust.cluster.engine.encoder import Encoder
    from llamaclust.model.loader import Model
    from llamaclust.model.projectors.projector import Projector

Tile = NDArray[np.uint8]  # [height, width, 3]
CheckLength = Callable[[int], None]
"""Takes a lower bound on the length of a prompt in tokens. Raises an error if the prompt is too long."""

ImagePrompt = tuple[tuple[int, ...], tuple[ImageSpan, ...]]
"""Token ids of a prompt, and the rows of its images. Each row has a position in the prompt, with token id 0."""

_MAX_LAYOUTS: Final = 1024
_FLOAT_BYTES: Final = 4
_Found = TypeVar("_Found")


class ImageEncoder(Protocol):
    def turn(self, owner: str) -> AbstractAsyncContextManager[None]:
        """Returns a context that is entered when it is the owner's turn to encode one image."""
        ...

    async def encode(self, tiles: Sequence[Tile], owners: Owners) -> list[Rows]:
        """Returns the embeddings of each tile, an array [rows, levels * width]."""
        ...


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The token ids and rows (the encoder's embeddings) that replace an image in a prompt."""

    pieces: tuple[tuple[int, ...] | TileRows, ...]
    grids: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    tile_bytes: int

    @property
    def ids(self) -> tuple[int, ...]:
        parts = ((0,) * (part.end - part.start) if isinstance(part, TileRows) else part for part in self.pieces)
        return tuple(chain.from_iterable(parts))

    @property
    def tokens(self) -> int:
        return sum(part.end - part.start if isinstance(part, TileRows) else len(part) for part in self.pieces)

    @property
    def rows(self) -> int:
        return sum(lines * columns for lines, columns in self.grids)


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    layout: ImageLayout
    tiles: tuple[Tile, ...]

    @property
    def nbytes(self) -> int:
        return self.layout.tile_bytes


@dataclass(frozen=True, slots=True)
class _PromptImage:
    """An image in a prompt. `tiles` is None if no tiles are needed."""

    source: ImageSource
    digest: bytes
    layout: ImageLayout
    tiles: Lease[_Tiles] | None = None

    @property
    def tile_bytes(self) -> int:
        return 0 if self.tiles is None else self.tiles.value.nbytes

    def release(self) -> None:
        if self.tiles is not None:
            self.tiles.release()


class Vision:
    """Lays out and encodes the images in prompts for one model. Use it on one event loop."""

    def __init__(
        self,
        projector: Projector,
        tokenizer: Tokenizer,
        encoder: ImageEncoder,
        preparation: ImagePreparation,
        rope_sections: int = 0,
        rows: RowCache | None = None,
    ) -> None:
        """`rope_sections` is the number of M-RoPE positions per row, or 0 without M-RoPE."""
        self._projector = projector
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._rope_sections = rope_sections
        usual = settings_of(projector)
        self._settings: Mapping[str, ImageSettings] = {**dict.fromkeys(DETAILS, usual), "low": low_detail(usual)}
        self._preparation = preparation
        self._layouts: OrderedDict[bytes, ImageLayout] = OrderedDict()
        self._rows = RowCache() if rows is None else rows
        self._preparing: SharedComputations[_Tiles] = SharedComputations(lambda _, tiles: self._rows.free(tiles.nbytes))
        self._encoding: SharedComputations[Rows] = SharedComputations(self._rows.keep)

    async def lay_out(self, prompt: PromptImages, check: CheckLength) -> tuple[int, ...]:
        """Returns the token ids of a prompt, with 0 for each row of an image. Raises RequestError."""
        with RowLeases() as leases:
            return await self._in_line(leases, partial(self._lay_out, prompt, check))

    async def image_prompt(self, prompt: PromptImages, check: CheckLength, leases: RowLeases) -> ImagePrompt:
        """Returns the token ids of a prompt and the rows of its images. Raises the errors of `lay_out`."""
        return await self._in_line(leases, partial(self._image_prompt, prompt, check, leases))

    async def _in_line(self, leases: RowLeases, work: Callable[[Place, ExitStack], Awaitable[_Found]]) -> _Found:
        """Calls `work`. If memory is short, releases what `work` holds, waits for memory, and calls `work` again."""
        with self._rows.line.place(current_owner.get()) as place:
            while True:
                with ExitStack() as own:
                    try:
                        found = await work(place, own)
                    except RowMemoryError as error:
                        if leases.own_bytes:
                            raise
                        size = error.size
                    else:
                        leases.add(own.pop_all().close)
                        return found
                await place.enter()
                await self._rows.wait_for(size)

    async def _lay_out(self, prompt: PromptImages, check: CheckLength, place: Place, _: ExitStack) -> tuple[int, ...]:
        ids: list[int] = []
        known = prompt.least_tokens
        begin, room = partial(self._layout, place), partial(self._room, place)
        async with aclosing(Prefetch(prompt.sources, begin, room)) as images:
            for piece in prompt.pieces:
                if isinstance(piece, ImageSource):
                    layout = (await images.next(own_bytes=0)).layout
                    known += layout.tokens - 1
                    check(known)
                    ids += layout.ids
                else:
                    ids += piece
        return tuple(ids)

    async def _image_prompt(
        self, prompt: PromptImages, check: CheckLength, leases: RowLeases, place: Place, own: ExitStack
    ) -> ImagePrompt:
        ids: list[int] = []
        spans: list[ImageSpan] = []
        known = prompt.least_tokens
        own_bytes = dict(leases.own_bytes)
        begin, room = partial(self._begin, place), partial(self._room, place)
        async with aclosing(Prefetch(prompt.sources, begin, room)) as images:
            for piece in prompt.pieces:
                if isinstance(piece, ImageSource):
                    image = await images.next(sum(own_bytes.values()))
                    try:
                        known += image.layout.tokens - 1
                        check(known)
                        spans += self._spans(len(ids), image, await self._leased(images, image, own_bytes, place, own))
                        ids += image.layout.ids
                    finally:
                        image.release()
                else:
                    ids += piece
        leases.own_bytes = own_bytes
        return tuple(ids), tuple(spans)

    async def _room(self, place: Place, own_bytes: int, size: int) -> None:
        """Makes room for `size` more bytes. Raises ParameterError or RowMemoryError."""
        self._rows.check(own_bytes + size)
        if place.is_first:
            await self._rows.wait_for(size)
            return
        try:
            self._check_open(place, size)
            self._rows.make_room(size)
        except RowMemoryError as error:
            raise RowMemoryError(error.held_bytes, own_bytes + size) from error

    def _check_open(self, place: Place, size: int = 0) -> None:
        if not place.is_open:
            raise RowMemoryError(self._rows.held_bytes, size)

    async def _leased(
        self,
        images: Prefetch[_PromptImage],
        image: _PromptImage,
        own_bytes: dict[bytes, int],
        place: Place,
        own: ExitStack,
    ) -> Rows:
        """Returns the rows of an image, and adds their size to `own_bytes`. Closing `own` releases the rows."""
        before = sum(own_bytes.values())
        own_bytes[image.digest] = self._bytes_of(image.layout)
        self._rows.check(sum(own_bytes.values()) + image.tile_bytes)
        lease = await images.with_room(partial(self._rows_of, image, place), before + image.tile_bytes)
        own.callback(lease.release)
        own.enter_context(self._rows.owned.holding(current_owner.get(), lease.value.nbytes))
        return lease.value

    async def _layout(self, place: Place, source: ImageSource) -> _PromptImage:
        digest = await self._digest(source)
        layout = self._known(digest)
        if layout is None:
            tiles = await self._tiles_of(digest, source, place)
            layout = tiles.value.layout
            tiles.release()
        return _PromptImage(source, digest, layout)

    def _known(self, digest: bytes) -> ImageLayout | None:
        layout = self._layouts.get(digest)
        if layout is not None:
            self._layouts.move_to_end(digest)
        return layout

    async def _begin(self, place: Place, source: ImageSource) -> _PromptImage:
        digest = await self._digest(source)
        layout = self._known(digest)
        if layout is not None and (digest in self._encoding or digest in self._rows):
            return _PromptImage(source, digest, layout)
        tiles = await self._tiles_of(digest, source, place)
        return _PromptImage(source, digest, tiles.value.layout, tiles)

    async def _digest(self, source: ImageSource) -> bytes:
        settings = self._settings[source.detail]
        return await run_on(TOKENIZING, settings.digest, source.data, self._projector.identity)

    async def _tiles_of(self, digest: bytes, source: ImageSource, place: Place | None = None) -> Lease[_Tiles]:
        """Prepares the tiles of an image. Raises RowMemoryError if the request must first wait for its turn."""
        if place is not None and digest not in self._preparing:
            self._check_open(place)
        owner = current_owner.get()
        turn = self._preparation.turn(owner)
        return await self._preparing.take(digest, owner, turn, partial(self._prepare, digest, source))

    async def _prepare(self, digest: bytes, source: ImageSource, _: Owners) -> _Tiles:
        image = await self._preparation.tiles(source.data, self._settings[source.detail])
        layout = await run_on(TOKENIZING, self._layout_of, image)
        self._layouts[digest] = layout
        while len(self._layouts) > _MAX_LAYOUTS:
            self._layouts.popitem(last=False)
        tiles = _Tiles(layout, image.tiles)
        self._rows.use(tiles.nbytes)
        return tiles

    def _layout_of(self, image: ImageTiles) -> ImageLayout:
        """Computes the layout of an image. Raises RequestError if the encoder does not accept a tile's size."""
        counts = [self._projector.rows_of(*tile.shape[:2]) for tile in image.tiles]
        side = self._projector.patch_size * self._projector.merge
        grids = tuple((tile.shape[0] // side, tile.shape[1] // side) for tile in image.tiles)
        pieces = tuple(
            tuple(encode_text(self._tokenizer, piece)) if isinstance(piece, str) else piece for piece in image.prompt
        )
        tile_bytes = sum(tile.nbytes for tile in image.tiles)
        return ImageLayout(pieces, grids, (0, *accumulate(counts[:-1])), tile_bytes)

    def _bytes_of(self, layout: ImageLayout) -> int:
        return layout.rows * self._projector.width * self._projector.levels * _FLOAT_BYTES

    async def _rows_of(self, image: _PromptImage, place: Place) -> Lease[Rows]:
        """Returns the rows of an image. Raises RowMemoryError with the number of bytes that are missing."""
        digest, owner = image.digest, current_owner.get()
        lacking = self._bytes_of(image.layout) + image.layout.tile_bytes - image.tile_bytes
        if digest not in self._encoding:
            if (rows := self._rows.reuse(digest)) is not None:
                return self._encoding.put(digest, owner, rows)
            self._check_open(place, lacking)
        try:
            return await self._encoding.take(digest, owner, self._encoder.turn(owner), partial(self._compute, image))
        except RowMemoryError as error:  # Another request that shares the computation may lack fewer or more bytes.
            raise RowMemoryError(error.held_bytes, lacking) from error

    async def _compute(self, image: _PromptImage, owners: Owners) -> Rows:
        tiles = await self._tiles_of(image.digest, image.source)
        size = self._bytes_of(tiles.value.layout)
        try:
            self._rows.use(size)
            try:
                parts = await self._encoder.encode(tiles.value.tiles, owners)
                rows = await run_on(TOKENIZING, joined_rows, parts)
            except BaseException:
                self._rows.free(size)
                raise
        finally:
            tiles.release()
        rows.flags.writeable = False
        return rows

    def _spans(self, start: int, image: _PromptImage, rows: Rows) -> Iterator[ImageSpan]:
        layout = image.layout
        for piece in layout.pieces:
            if not isinstance(piece, TileRows):
                start += len(piece)
                continue
            end, first = start + piece.end - piece.start, layout.starts[piece.tile] + piece.start
            yield ImageSpan(
                start,
                end,
                rows[first : first + end - start],
                image.digest,
                self._projector.is_bidirectional,
                self._rope_positions(piece, layout.grids[piece.tile][1]),
                first,
            )
            start = end

    def _rope_positions(self, rows: TileRows, columns: int) -> NDArray[np.int32] | None:
        """Returns M-RoPE positions [sections, tokens]. Section 1 has grid rows, section 2 has columns, others are 0."""
        if not self._rope_sections:
            return None
        positions = np.zeros((self._rope_sections, rows.end - rows.start), np.int32)
        lines, places = np.divmod(np.arange(rows.start, rows.end, dtype=np.int32), columns)
        positions[1], positions[2] = lines - lines[0], places
        return positions


def joined_rows(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 and parts[0].base is None else np.concatenate(parts)


def vision_of(model: Model, encoder: Encoder | None, preparation: ImagePreparation, rows: RowCache) -> Vision | None:
    if model.projector is None or encoder is None:
        return None
    return Vision(model.projector, model.tokenizer, encoder, preparation, model.rope_sections, rows)
