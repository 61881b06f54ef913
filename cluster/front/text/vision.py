"""Prompts with images for a model with a projector: their token ids, and the rows in place of the images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.front.text.image_rows import RowCache, RowMemoryError, Rows, SharedComputations
from llamaclust.cluster.front.text.images import ImageSource, PromptImages
from llamaclust.cluster.front.text.prefetch import Prefetch
from llamaclust.cluster.front.text.sharing import TOKENIZING, current_owner, run_on
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
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
Encode = Callable[[Sequence[Tile], str], Awaitable[list[Rows]]]
"""Computes the rows [rows, levels * width] of each tile, line by line, for an owner of requests."""
CheckLength = Callable[[int], None]
"""Raises an error if a prompt has at least this many tokens, and these are too many."""

_MAX_LAYOUTS: Final = 1024
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The part of a prompt that an image becomes. `grids`: lines and columns of each tile; `starts`: rows before it."""

    pieces: tuple[tuple[int, ...] | TileRows, ...]
    grids: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids, with 0 for each row."""
        parts = ((0,) * (part.end - part.start) if isinstance(part, TileRows) else part for part in self.pieces)
        return tuple(chain.from_iterable(parts))

    @property
    def tokens(self) -> int:
        return sum(part.end - part.start if isinstance(part, TileRows) else len(part) for part in self.pieces)

    @property
    def rows(self) -> int:
        return sum(lines * columns for lines, columns in self.grids)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Tiles:
    layout: ImageLayout
    tiles: tuple[Tile, ...]

    @property
    def nbytes(self) -> int:
        return sum(tile.nbytes for tile in self.tiles)


@dataclass(frozen=True, slots=True)
class _Begun:
    """An image in a prompt. If its rows are not known and nobody computes them, it has tiles."""

    source: ImageSource
    digest: bytes
    layout: ImageLayout
    rows: Rows | None
    tiles: _Tiles | None

    @property
    def tile_bytes(self) -> int:
        return 0 if self.tiles is None else self.tiles.nbytes


class Vision:
    """The images of one served model. Use it on one event loop."""

    def __init__(
        self,
        projector: Projector,
        tokenizer: Tokenizer,
        encode: Encode,
        preparation: ImagePreparation,
        rope_sections: int = 0,
        rows: RowCache | None = None,
    ) -> None:
        """Models may share `rows`. `rope_sections`: positions of a row (M-RoPE: time, line, column); 0: only one."""
        self._projector = projector
        self._tokenizer = tokenizer
        self._encode = encode
        self._rope_sections = rope_sections
        usual = settings_of(projector)
        self._settings: Mapping[str, ImageSettings] = {"auto": usual, "high": usual, "low": low_detail(usual)}
        self._preparation = preparation
        self._layouts: OrderedDict[bytes, ImageLayout] = OrderedDict()
        self._preparing: SharedComputations[_Tiles] = SharedComputations()
        self._tiles: WeakValueDictionary[bytes, _Tiles] = WeakValueDictionary()  # that wait for the encoder
        self._encoding: SharedComputations[Rows] = SharedComputations()
        self._rows = RowCache() if rows is None else rows

    async def lay_out(self, prompt: PromptImages, check: CheckLength) -> tuple[int, ...]:
        """Returns a prompt's token ids, 0 for each image row; encodes nothing. Raises RequestError for a bad image."""
        ids: list[int] = []
        known = prompt.least_tokens
        async with aclosing(Prefetch(prompt.sources, self._layout, self._rows)) as layouts:
            for piece in prompt.pieces:
                if isinstance(piece, ImageSource):
                    layout = await layouts.next()
                    known += layout.tokens - 1
                    check(known)
                    ids += layout.ids
                else:
                    ids += piece
        return tuple(ids)

    async def image_prompt(
        self, prompt: PromptImages, check: CheckLength
    ) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
        """Returns a prompt's token ids and image rows. Raises errors of `lay_out` and `Encode`, RowMemoryError."""
        ids: list[int] = []
        spans: list[ImageSpan] = []
        known = prompt.least_tokens
        own_bytes: dict[bytes, int] = {}  # of rows, by image
        async with aclosing(Prefetch(prompt.sources, self._begin, self._rows)) as images:
            for piece in prompt.pieces:
                if isinstance(piece, ImageSource):
                    image = await self._next(images, sum(own_bytes.values()))
                    known += image.layout.tokens - 1
                    check(known)
                    own_bytes[image.digest] = self._bytes_of(image.layout)
                    self._rows.check(sum(own_bytes.values()) + image.tile_bytes)
                    spans += self._spans(len(ids), image, await images.with_room(partial(self._rows_of, image)))
                    ids += image.layout.ids
                    del image  # its tiles take memory
                else:
                    ids += piece
        return tuple(ids), tuple(spans)

    async def _next(self, images: Prefetch[_Begun], own_bytes: int) -> _Begun:
        """Raises ParameterError if a request with `own_bytes` of rows cannot have the next image's tiles too."""
        try:
            return await images.next()
        except RowMemoryError as error:
            self._rows.check(own_bytes + error.size)
            raise

    async def _layout(self, source: ImageSource) -> ImageLayout:
        digest = await self._digest(source)
        return self._known(digest) or (await self._tiles_of(digest, source)).layout

    def _known(self, digest: bytes) -> ImageLayout | None:
        layout = self._layouts.get(digest)
        if layout is not None:
            self._layouts.move_to_end(digest)
        return layout

    async def _begin(self, source: ImageSource) -> _Begun:
        digest = await self._digest(source)
        layout, rows = self._known(digest), self._rows.get(digest)
        if layout is not None and (rows is not None or digest in self._encoding):
            return _Begun(source, digest, layout, rows, None)
        tiles = await self._tiles_of(digest, source)
        return _Begun(source, digest, tiles.layout, rows, tiles if rows is None else None)

    async def _digest(self, source: ImageSource) -> bytes:
        settings = self._settings[source.detail]
        return await run_on(TOKENIZING, settings.digest, source.data, self._projector.identity)

    async def _tiles_of(self, digest: bytes, source: ImageSource) -> _Tiles:
        tiles = self._tiles.get(digest)
        return await self._preparing.get(digest, partial(self._prepare, digest, source)) if tiles is None else tiles

    async def _prepare(self, digest: bytes, source: ImageSource) -> _Tiles:
        settings = self._settings[source.detail]
        image = await self._preparation.prepare(source.data, settings, current_owner.get())
        layout = await run_on(TOKENIZING, self._layout_of, image)
        self._layouts[digest] = layout
        while len(self._layouts) > _MAX_LAYOUTS:
            self._layouts.popitem(last=False)
        tiles = _Tiles(layout, image.tiles)
        self._rows.count_tiles(tiles)
        self._tiles[digest] = tiles
        return tiles

    def _layout_of(self, image: ImageTiles) -> ImageLayout:
        """Raises RequestError for a tile of a size that the encoder does not take."""
        counts = [self._projector.rows_of(*tile.shape[:2]) for tile in image.tiles]
        side = self._projector.patch_size * self._projector.merge
        grids = tuple((tile.shape[0] // side, tile.shape[1] // side) for tile in image.tiles)
        pieces = tuple(
            tuple(encode_text(self._tokenizer, piece)) if isinstance(piece, str) else piece for piece in image.prompt
        )
        return ImageLayout(pieces, grids, (0, *accumulate(counts[:-1])))

    def _bytes_of(self, layout: ImageLayout) -> int:
        return layout.rows * self._projector.width * self._projector.levels * _FLOAT_BYTES

    async def _rows_of(self, image: _Begun) -> Rows:
        rows = self._rows.get(image.digest) if image.rows is None else image.rows
        return await self._encoding.get(image.digest, partial(self._compute, image)) if rows is None else rows

    async def _compute(self, image: _Begun) -> Rows:
        """Encodes an image. It is prepared again if the computation for which its caller waited was cancelled."""
        tiles = image.tiles or await self._tiles_of(image.digest, image.source)
        with self._rows.reserving(self._bytes_of(tiles.layout)):
            parts = await self._encode(tiles.tiles, current_owner.get())
            rows = await run_on(TOKENIZING, joined_rows, parts)
        self._rows.put(image.digest, rows)
        return rows

    def _spans(self, start: int, image: _Begun, rows: Rows) -> Iterator[ImageSpan]:
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
        """Returns [sections, rows]: the time, which is 0, then the line and column in the span, then zeros."""
        if not self._rope_sections:
            return None
        positions = np.zeros((self._rope_sections, rows.end - rows.start), np.int32)
        lines, places = np.divmod(np.arange(rows.start, rows.end, dtype=np.int32), columns)
        positions[1], positions[2] = lines - lines[0], places
        return positions


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all tiles, which may take long."""
    return parts[0] if len(parts) == 1 and parts[0].base is None else np.concatenate(parts)


def vision_of(model: Model, encoder: Encoder | None, preparation: ImagePreparation, rows: RowCache) -> Vision | None:
    """Returns the images of a model. None: it reads text only."""
    if model.projector is None or encoder is None:
        return None
    return Vision(model.projector, model.tokenizer, encoder.encode, preparation, model.rope_sections, rows)
