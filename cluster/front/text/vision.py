"""Prompts with images for a model with a projector: their token ids, and the rows in place of the images."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.front.text.image_rows import ImageRows, RowLimits, Rows, SharedComputations
from llamaclust.cluster.front.text.images import ImageSource, PromptImages
from llamaclust.cluster.front.text.sharing import TOKENIZING, current_owner, run_on
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.core.errors import RequestFailedError
from llamaclust.model.chat.prompt import encode_text
from llamaclust.model.images.preparation import ImagePreparation, ImageTiles
from llamaclust.model.images.projector_settings import low_detail, settings_of
from llamaclust.model.images.prompt import TileRows
from llamaclust.model.images.settings import ImageSettings
from llamaclust.model.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamaclust.model.projectors.projector import Projector

Tile = NDArray[np.uint8]  # [height, width, 3]
Encode = Callable[[Sequence[Tile], str], Awaitable[list[Rows]]]
"""Computes the rows [rows, levels * width] of each tile, line by line, for an owner of requests."""
CheckLength = Callable[[int], None]
"""Raises an error if a prompt has at least this many tokens, and these are too many."""

_MAX_LAYOUTS: Final = 1024
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of a prompt that an image becomes. `pieces`: token ids, and rows of tiles. `grids`: the lines and
    columns of rows of each tile. `starts`: the number of rows before each tile."""

    pieces: tuple[tuple[int, ...] | TileRows, ...]
    grids: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids, with 0 for each row."""
        parts = ((0,) * (part.end - part.start) if isinstance(part, TileRows) else part for part in self.pieces)
        return tuple(token for part in parts for token in part)

    @property
    def tokens(self) -> int:
        return sum(part.end - part.start if isinstance(part, TileRows) else len(part) for part in self.pieces)

    @property
    def rows(self) -> int:
        return sum(lines * columns for lines, columns in self.grids)


@dataclass(frozen=True, slots=True)
class _Tiles:
    layout: Layout
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class _Encoded:
    digest: bytes
    layout: Layout
    rows: Rows


class Vision:
    """The images of one served model. Use it on one event loop."""

    def __init__(
        self,
        projector: Projector,
        tokenizer: Tokenizer,
        encode: Encode,
        rope_sections: int = 0,
        limits: RowLimits | None = None,
    ) -> None:
        """`rope_sections`: the text model's rope positions of a row (M-RoPE: time, line, column); 0: only one."""
        self._projector = projector
        self._tokenizer = tokenizer
        self._encode = encode
        self._rope_sections = rope_sections
        usual = settings_of(projector)
        self._settings: Mapping[str, ImageSettings] = {"auto": usual, "high": usual, "low": low_detail(usual)}
        self._preparations = {each: ImagePreparation(each) for each in {*self._settings.values()}}
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._preparing: SharedComputations[_Tiles] = SharedComputations()
        self._encoding: SharedComputations[Rows] = SharedComputations()
        self._rows = ImageRows(limits)

    async def aclose(self) -> None:
        """Ends the processes that prepare images."""
        for preparation in self._preparations.values():
            await asyncio.to_thread(preparation.close)

    async def lay_out(self, prompt: PromptImages, check: CheckLength) -> tuple[int, ...]:
        """Returns the token ids of a prompt, with 0 for each row of an image. Nothing is encoded. Raises RequestError
        for an image that cannot be read, and errors of `ImagePreparation` and `check`."""
        ids: list[int] = []
        known = prompt.least_tokens
        for piece in prompt.pieces:
            if isinstance(piece, ImageSource):
                layout = await self._layout(piece)
                known += layout.tokens - 1
                check(known)
                ids += layout.ids
            else:
                ids += piece
        return tuple(ids)

    async def image_prompt(
        self, prompt: PromptImages, check: CheckLength
    ) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
        """Returns the token ids of a prompt, and the rows of its images. Raises errors of `lay_out` and `Encode`, and
        QueueFullError if images of other requests take too much memory."""
        ids: list[int] = []
        spans: list[ImageSpan] = []
        known, row_bytes = prompt.least_tokens, 0
        for piece in prompt.pieces:
            if isinstance(piece, ImageSource):
                layout, digest, tiles = await self._start(piece)
                known += layout.tokens - 1
                check(known)
                row_bytes += self._bytes_of(layout)
                self._rows.check(row_bytes)
                rows = await self._rows_of(digest, piece, tiles)
                spans += self._spans(len(ids), _Encoded(digest, layout, rows))
                ids += layout.ids
            else:
                ids += piece
        return tuple(ids), tuple(spans)

    async def _layout(self, source: ImageSource) -> Layout:
        digest = await self._digest(source)
        return self._known(digest) or (await self._tiles_of(digest, source)).layout

    def _known(self, digest: bytes) -> Layout | None:
        layout = self._layouts.get(digest)
        if layout is not None:
            self._layouts.move_to_end(digest)
        return layout

    async def _start(self, source: ImageSource) -> tuple[Layout, bytes, _Tiles | None]:
        """Returns an image's layout and digest, and its tiles if its rows are not known and nobody computes them."""
        digest = await self._digest(source)
        layout = self._known(digest)
        if layout is not None and (self._rows.get(digest) is not None or digest in self._encoding):
            return layout, digest, None
        tiles = await self._tiles_of(digest, source)
        return tiles.layout, digest, tiles

    async def _digest(self, source: ImageSource) -> bytes:
        settings = self._settings[source.detail]
        return await run_on(TOKENIZING, settings.digest, source.data, self._projector.identity)

    async def _tiles_of(self, digest: bytes, source: ImageSource) -> _Tiles:
        return await self._preparing.get(digest, partial(self._prepare, digest, source))

    async def _prepare(self, digest: bytes, source: ImageSource) -> _Tiles:
        image = await self._preparations[self._settings[source.detail]].prepare_async(source.data)
        layout = await run_on(TOKENIZING, self._layout_of, image)
        self._layouts[digest] = layout
        while len(self._layouts) > _MAX_LAYOUTS:
            self._layouts.popitem(last=False)
        return _Tiles(layout, image.tiles)

    def _layout_of(self, image: ImageTiles) -> Layout:
        """Raises RequestError for a tile of a size that the encoder does not take."""
        counts = [self._projector.rows_of(*tile.shape[:2]) for tile in image.tiles]
        side = self._projector.patch_size * self._projector.merge
        grids = tuple((tile.shape[0] // side, tile.shape[1] // side) for tile in image.tiles)
        pieces = tuple(
            tuple(encode_text(self._tokenizer, piece)) if isinstance(piece, str) else piece for piece in image.prompt
        )
        return Layout(pieces, grids, (0, *accumulate(counts[:-1])))

    def _bytes_of(self, layout: Layout) -> int:
        return layout.rows * self._projector.width * self._projector.levels * _FLOAT_BYTES

    async def _rows_of(self, digest: bytes, source: ImageSource, tiles: _Tiles | None) -> Rows:
        rows = self._rows.get(digest)
        if rows is not None:
            return rows
        return await self._encoding.get(digest, partial(self._compute, digest, source, tiles))

    async def _compute(self, digest: bytes, source: ImageSource, tiles: _Tiles | None) -> Rows:
        """Encodes an image. It is prepared again if the computation for which its caller waited was cancelled."""
        if tiles is None:
            tiles = await self._tiles_of(digest, source)
        with self._rows.reserving(self._bytes_of(tiles.layout)):
            parts = await self._encode(tiles.tiles, current_owner.get())
            for part, (lines, columns) in zip(parts, tiles.layout.grids, strict=True):
                if len(part) != lines * columns:
                    what = f"expected {lines * columns} rows of a tile from the encoder, found {len(part)}"
                    raise RequestFailedError(f"{what}; send the image again")
            rows = np.concatenate(parts)
        self._rows.put(digest, rows)
        return rows

    def _spans(self, start: int, image: _Encoded) -> Iterator[ImageSpan]:
        for piece in image.layout.pieces:
            if not isinstance(piece, TileRows):
                start += len(piece)
                continue
            end, first = start + piece.end - piece.start, image.layout.starts[piece.tile] + piece.start
            yield ImageSpan(
                start,
                end,
                image.rows[first : first + end - start],
                image.digest,
                self._projector.is_bidirectional,
                self._rope_positions(piece, image.layout.grids[piece.tile][1]),
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
