"""Prompts with images of every family: token ids, rows of an encoder in this process, and rope positions."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.front.text.image_rows import RowCache, RowLimits, RowMemoryError
from llamaclust.cluster.front.text.images import ImageSource
from llamaclust.core.errors import ContextLengthError, ParameterError, QueueFullError, RequestError, WorkerError
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.images.families.family import TileRows
from llamaclust.model.images.preparation import ImagePreparation
from llamaclust.model.images.projector_settings import low_detail, settings_of
from support.chat.seeing import BEFORE, BETWEEN, any_length, png, prompt_of, seeing, spans_of
from support.clusters.served import ids
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import PROJECTORS

TURNED = ("qwen2.5vl_merger", "qwen3vl_merger", "glm4v")
FIRST, SECOND = png(1), png(2)


@pytest.mark.parametrize("name", PROJECTORS)
async def test_rows_stand_in_the_family_s_prompt(name: str, tmp_path: Path) -> None:
    async with seeing(tmp_path, name, 3 if name in TURNED else 0) as (vision, encoder, projector):
        found, spans = await vision.image_prompt(prompt_of(FIRST, SECOND), any_length)
        assert await vision.lay_out(prompt_of(FIRST, SECOND), any_length) == found
        assert encoder.images == 2
        async with ImagePreparation() as preparation:
            made = [await preparation.prepare(image, settings_of(projector)) for image in (FIRST, SECOND)]
    wanted, rows = [*BEFORE], []
    for image in made:
        tiles = [encoded(ReferenceBackend(), encoder.path, tile) for tile in image.tiles]
        for piece in image.prompt:
            if isinstance(piece, TileRows):
                wanted += [0] * (piece.end - piece.start)
                rows.append(tiles[piece.tile][piece.start : piece.end])
            else:
                wanted += ids(piece)
        wanted += BETWEEN
    assert list(found) == wanted
    assert [at for span in spans for at in range(span.start, span.end)] == [at for at, i in enumerate(found) if not i]
    assert len(spans) == len(rows)
    for span, expected in zip(spans, rows, strict=True):
        np.testing.assert_array_equal(span.rows.view("u4"), np.ascontiguousarray(expected).view("u4"))
        assert span.rows.shape[1] == projector.width * projector.levels
        assert span.is_bidirectional is (name in ("gemma3", "gemma4v"))
        assert (span.rope_positions is not None) is (name in TURNED)
    assert len({span.digest for span in spans}) == 2
    by_image = [[span for span in spans if span.digest == digest] for digest in dict.fromkeys(s.digest for s in spans)]
    for parts in by_image:
        assert [span.offset for span in parts] == [
            sum(len(span.rows) for span in parts[:number]) for number in range(len(parts))
        ]


@pytest.mark.parametrize("sections", [3, 4])
async def test_rope_positions_are_the_time_line_and_column(sections: int, tmp_path: Path) -> None:
    """44 x 30 pixels are resized to 40 x 32, which are 5 columns and 4 lines of rows of 8 x 8 pixels."""
    async with seeing(tmp_path, "qwen3vl_merger", sections) as (vision, _, projector):
        (span,) = await spans_of(vision, FIRST)
    assert span.rope_positions is not None and projector.levels == 3
    lines, columns = np.mgrid[0:4, 0:6] if len(span.rows) == 24 else np.mgrid[0:4, 0:5]
    wanted = np.zeros((sections, lines.size), np.int32)
    wanted[1], wanted[2] = lines.reshape(-1), columns.reshape(-1)
    np.testing.assert_array_equal(span.rope_positions, wanted)


async def test_equal_images_are_encoded_once(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        encoder.gate.clear()
        waiting = [asyncio.create_task(spans_of(vision, FIRST, FIRST)) for _ in range(3)]
        await asyncio.wait_for(encoder.begun.wait(), 60)
        waiting.append(asyncio.create_task(spans_of(vision, FIRST)))
        encoder.gate.set()
        spans = [span for each in await asyncio.gather(*waiting) for span in each]
        assert len({id(span.rows.base) for span in spans}) == 1 and encoder.images == 1
        await spans_of(vision, FIRST, SECOND)
        assert encoder.images == 2


async def test_low_detail_has_fewer_rows_of_its_own(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, projector):
        low, spans = await vision.image_prompt(prompt_of(FIRST, detail="low"), any_length)
        high, more = await vision.image_prompt(prompt_of(FIRST, detail="high"), any_length)
        auto, same = await vision.image_prompt(prompt_of(FIRST), any_length)
    assert auto == high and len(low) < len(high)
    assert [span.digest for span in same] == [span.digest for span in more] and spans[0].digest != more[0].digest
    assert len(spans) == 1 and len(more) > 4 and encoder.images == 2
    assert low_detail(settings_of(projector)).longest_edge == projector.images.image_size


async def test_an_error_reaches_all_that_wait_and_nobody_later(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        encoder.gate.clear()
        encoder.failure = WorkerError("the encoder is gone")
        waiting = [asyncio.create_task(spans_of(vision, FIRST)) for _ in range(3)]
        await asyncio.wait_for(encoder.begun.wait(), 60)
        encoder.gate.set()
        assert {str(error) for error in await asyncio.gather(*waiting, return_exceptions=True)} == {
            str(encoder.failure)
        }
        encoder.failure = None
        assert await spans_of(vision, FIRST) and encoder.images == 2


async def test_one_that_leaves_does_not_end_the_computation_of_others(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        encoder.gate.clear()
        first, second = (asyncio.create_task(spans_of(vision, FIRST)) for _ in range(2))
        await asyncio.wait_for(encoder.begun.wait(), 60)
        first.cancel()
        await asyncio.wait([first])
        encoder.gate.set()
        assert await second and encoder.images == 1 and first.cancelled()


async def test_the_last_that_leaves_ends_the_computation(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        encoder.gate.clear()
        tasks = [asyncio.create_task(spans_of(vision, FIRST)) for _ in range(2)]
        await asyncio.wait_for(encoder.begun.wait(), 60)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.wait_for(encoder.cancelled.wait(), 60)
        encoder.gate.set()
        assert await spans_of(vision, FIRST) and encoder.images == 2


async def test_a_prompt_that_is_too_long_is_not_encoded(tmp_path: Path) -> None:
    def check(tokens: int) -> None:
        if tokens > 40:
            raise ContextLengthError("is too long", tokens, 40)

    async with seeing(tmp_path) as (vision, encoder, _):
        for _ in range(2):  # the second time, the image's layout is known
            with pytest.raises(ContextLengthError):
                await vision.image_prompt(prompt_of(FIRST), check)
            with pytest.raises(ContextLengthError):
                await vision.lay_out(prompt_of(FIRST), check)
        assert encoder.images == 0


async def test_an_image_that_cannot_be_read_is_an_error_of_its_request(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        with pytest.raises(RequestError, match="begins with b'GIF88a'"):
            await spans_of(vision, b"GIF88a")
        assert encoder.images == 0


async def test_memory_of_rows_is_bounded(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, *_):
        size = sum(span.rows.nbytes for span in await spans_of(vision, FIRST))
        tiles = await vision._tiles_of(b"", ImageSource(FIRST))
    async with seeing(tmp_path, limits=RowLimits(size, 2 * size + tiles.nbytes)) as (vision, encoder, _):
        first = await spans_of(vision, FIRST)
        second = await spans_of(vision, SECOND)
        with pytest.raises(QueueFullError, match="other requests"):
            await spans_of(vision, png(3))
        assert tiles.nbytes < 2 * size
        with pytest.raises(ParameterError, match="send fewer or smaller images"):
            await spans_of(vision, FIRST, SECOND, png(3))
        assert encoder.images == 2 and len({span.digest for span in (*first, *second)}) == 2
        del first  # its rows are no longer kept
        gc.collect()
        assert await spans_of(vision, png(3)) and encoder.images == 3
        await spans_of(vision, SECOND)
        assert encoder.images == 3, "a request has them still"
        await spans_of(vision, FIRST)
        assert encoder.images == 4


async def _sizes(folder: Path) -> tuple[int, int]:
    """The bytes of an image's rows and of its tiles."""
    async with seeing(folder) as (vision, *_):
        rows = sum(span.rows.nbytes for span in await spans_of(vision, FIRST))
        return rows, (await vision._tiles_of(b"", ImageSource(FIRST))).nbytes


@pytest.mark.parametrize("images", [(FIRST, SECOND, png(3)), (FIRST, SECOND, FIRST, SECOND, png(3), FIRST)])
async def test_a_request_that_fits_alone_is_served(images: tuple[bytes, ...], tmp_path: Path) -> None:
    rows, tiles = await _sizes(tmp_path)
    most = 3 * rows + tiles
    async with seeing(tmp_path, limits=RowLimits(0, most)) as (vision, encoder, _):
        assert len({span.digest for span in await spans_of(vision, *images)}) == 3 and encoder.images == 3
    async with seeing(tmp_path, limits=RowLimits(0, most - 1)) as (vision, encoder, _):
        for _ in range(2):
            with pytest.raises(ParameterError, match="send fewer or smaller images"):
                await spans_of(vision, *images)
        await asyncio.sleep(0)  # the event loop has the last result until then
        gc.collect()
        assert not vision._rows.held_bytes


async def test_an_image_whose_tiles_never_fit_is_refused_for_ever(tmp_path: Path) -> None:
    _, tiles = await _sizes(tmp_path)
    async with seeing(tmp_path, limits=RowLimits(0, tiles - 1)) as (vision, *_):
        for counted in (vision.lay_out, vision.image_prompt):
            with pytest.raises(ParameterError, match="send fewer or smaller images"):
                await counted(prompt_of(FIRST), any_length)


def _rows(n_bytes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.zeros((n_bytes // 4, 1), np.float32)


def test_kept_rows_are_dropped_only_if_that_gives_the_memory() -> None:
    cache = RowCache(RowLimits(kept_bytes=1000, held_bytes=1000))
    for name in (b"a", b"b", b"c"):
        cache.put(name, _rows(200))
    used = cache.get(b"b")
    assert used is not None
    part = used[3:5]
    del used
    for too_many in (801, 1001):
        with pytest.raises(ParameterError if too_many > 1000 else RowMemoryError):
            cache.make_room(too_many)
        assert cache.kept_bytes == 600 and all(cache.get(name) is not None for name in (b"a", b"c", b"b"))
    cache.make_room(600)
    assert cache.get(b"a") is None and cache.get(b"c") is not None and cache.held_bytes == 400
    cache.make_room(800)
    assert cache.get(b"c") is None and cache.get(b"b") is not None and cache.held_bytes == 200
    del part
    cache.make_room(1000)
    assert cache.held_bytes == cache.kept_bytes == 0


@pytest.mark.parametrize(("gib", "mib"), [(64, 1024), (16, 1024), (2, 128), (0, 0)])
def test_rows_take_a_part_of_a_small_machine_s_memory(gib: int, mib: int) -> None:
    limits = RowLimits.of(gib << 30)
    assert limits.held_bytes == mib << 20 and limits.kept_bytes == mib << 18
