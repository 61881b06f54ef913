"""Tests of prompts with images for every family: token ids, rows of an encoder in this process, rope positions."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from llamaclust.cluster.front.text.image_rows import RowCache, RowLeases, RowLimits, RowMemoryError
from llamaclust.cluster.front.text.images import ImageSource
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.core.errors import ContextLengthError, ParameterError, RequestError, WorkerError
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.images.families.family import TileRows
from llamaclust.model.images.preparation import ImagePreparation, ImageTiles
from llamaclust.model.images.projector_settings import low_detail, settings_of
from llamaclust.model.images.settings import ImageSettings
from support.chat.seeing import BEFORE, BETWEEN, any_length, png, prompt_of, seeing, spans_of
from support.clusters.served import ids, until
from support.models.vision.encoded_tiles import encoded
from support.models.vision.tiny_projectors import PROJECTORS

_Value = TypeVar("_Value")
TURNED = ("qwen2.5vl_merger", "qwen3vl_merger", "glm4v")
FIRST, SECOND = png(1), png(2)


@pytest.mark.parametrize("name", PROJECTORS)
async def test_rows_stand_in_the_family_s_prompt(name: str, tmp_path: Path) -> None:
    async with seeing(tmp_path, name, 3 if name in TURNED else 0) as (vision, encoder, projector):
        found, spans = await vision.image_prompt(prompt_of(FIRST, SECOND), any_length, RowLeases())
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
    """Tests an image of 44 x 30 pixels, resized to 40 x 32: 5 columns and 4 lines of 8 x 8 pixels per row."""
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
        low, spans = await vision.image_prompt(prompt_of(FIRST, detail="low"), any_length, RowLeases())
        high, more = await vision.image_prompt(prompt_of(FIRST, detail="high"), any_length, RowLeases())
        auto, same = await vision.image_prompt(prompt_of(FIRST), any_length, RowLeases())
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
                await vision.image_prompt(prompt_of(FIRST), check, RowLeases())
            with pytest.raises(ContextLengthError):
                await vision.lay_out(prompt_of(FIRST), check)
        assert encoder.images == 0


async def test_an_image_that_cannot_be_read_is_an_error_of_its_request(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        with pytest.raises(RequestError, match="begins with b'GIF88a'"):
            await spans_of(vision, b"GIF88a")
        assert encoder.images == 0


async def test_memory_of_rows_is_bounded(tmp_path: Path) -> None:
    size, n_bytes = await _sizes(tmp_path)
    async with seeing(tmp_path, limits=RowLimits(size, 2 * size + n_bytes)) as (vision, encoder, _):
        first, second = RowLeases(), RowLeases()
        await spans_of(vision, FIRST, leases=first)
        await spans_of(vision, SECOND, leases=second)
        assert n_bytes < 2 * size
        with pytest.raises(ParameterError, match="send fewer or smaller images"):
            await spans_of(vision, FIRST, SECOND, png(3))
        third = asyncio.create_task(spans_of(vision, png(3)))
        await until(lambda: vision._rows.line.is_busy)
        assert encoder.images == 2 and not third.done()
        first.close()  # the rows of FIRST are dropped
        assert await third and encoder.images == 3
        await spans_of(vision, SECOND)
        assert encoder.images == 3, "a request has them still"
        await spans_of(vision, FIRST)
        assert encoder.images == 4
        second.close()
        assert vision._rows.used_bytes == 0 and not vision._rows.owned.held


async def _sizes(folder: Path, image: bytes = FIRST) -> tuple[int, int]:
    """Returns the sizes of an image's rows and tiles in bytes."""
    async with seeing(folder) as (vision, *_):
        rows = sum(span.rows.nbytes for span in await spans_of(vision, image))
        return rows, (await vision._tiles_of(b"", ImageSource(image))).value.nbytes


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
        assert not vision._rows.held_bytes


async def test_prompts_of_a_request_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    rows, tiles = await _sizes(tmp_path)
    async with seeing(tmp_path, limits=RowLimits(0, 2 * rows + tiles)) as (vision, *_):
        with RowLeases() as leases:
            for image in (FIRST, SECOND, FIRST):
                await spans_of(vision, image, leases=leases)
            with pytest.raises(ParameterError, match="send fewer or smaller images"):
                await spans_of(vision, png(3), leases=leases)
        assert not vision._rows.held_bytes and not vision._rows.line.is_busy


async def test_an_image_that_never_fits_beside_its_request_s_rows_is_refused_in_line(tmp_path: Path) -> None:
    large = png(3, 200, 200)
    rows, tiles = await _sizes(tmp_path)
    large_rows, large_tiles = await _sizes(tmp_path, large)
    most = 2 * rows + large_tiles - 1
    assert 2 * rows + tiles <= most < large_rows + tiles + rows
    async with seeing(tmp_path, limits=RowLimits(0, most)) as (vision, *_):
        held = RowLeases()
        await spans_of(vision, large, leases=held)
        waits = for_owner("one", spans_of(vision, FIRST, SECOND, large))
        await until(lambda: vision._rows.line.is_busy)
        other = for_owner("two", spans_of(vision, png(4)))
        held.close()
        async with asyncio.timeout(60):
            with pytest.raises(ParameterError, match="send fewer or smaller images"):
                await waits
            assert await other
        assert not vision._rows.held_bytes and not vision._rows.line.is_busy


@pytest.mark.parametrize("fits_alone", [True, False])
async def test_kept_rows_that_are_dropped_before_their_turn_wait_for_room_for_tiles_too(
    fits_alone: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Replaces the second image's rows by the first's. Each image is prepared at most once outside the queue and once
    in it."""
    rows, tiles = await _sizes(tmp_path)
    begun = 0
    real = ImagePreparation.tiles

    async def counted(preparation: ImagePreparation, data: bytes, settings: ImageSettings) -> ImageTiles:
        nonlocal begun
        begun += 1
        assert begun <= 6
        return await real(preparation, data, settings)

    monkeypatch.setattr(ImagePreparation, "tiles", counted)
    limits = RowLimits(rows, (2 + fits_alone) * rows + tiles - 1)
    async with seeing(tmp_path, limits=limits) as (vision, *_):
        await spans_of(vision, SECOND)
        held = RowLeases()
        if fits_alone:
            await spans_of(vision, png(3), leases=held)
        both = asyncio.create_task(spans_of(vision, FIRST, SECOND))
        await until(lambda: both.done() or vision._rows.line.is_busy)
        if not fits_alone:
            with pytest.raises(ParameterError, match="send fewer or smaller images"):
                await both
            return
        assert not both.done()
        held.close()
        assert await both


async def test_an_image_whose_tiles_never_fit_is_refused_for_ever(tmp_path: Path) -> None:
    _, tiles = await _sizes(tmp_path)
    async with seeing(tmp_path, limits=RowLimits(0, tiles - 1)) as (vision, *_):
        for counted in (vision.lay_out, partial(vision.image_prompt, leases=RowLeases())):
            with pytest.raises(ParameterError, match="send fewer or smaller images"):
                await counted(prompt_of(FIRST), any_length)


def _rows(n_bytes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.zeros((n_bytes // 4, 1), np.float32)


def test_kept_rows_are_dropped_only_if_that_gives_the_memory() -> None:
    cache = RowCache(RowLimits(kept_bytes=1000, held_bytes=1000))
    for name in (b"a", b"b", b"c"):
        cache.use(200)
        cache.keep(name, _rows(200))
    used = cache.reuse(b"b")
    assert used is not None and b"b" not in cache and (cache.used_bytes, cache.kept_bytes) == (200, 400)
    for too_many in (801, 1001):
        with pytest.raises(ParameterError if too_many > 1000 else RowMemoryError):
            cache.make_room(too_many)
        assert cache.kept_bytes == 400 and b"a" in cache and b"c" in cache
    cache.make_room(600)
    assert b"a" not in cache and b"c" in cache and cache.held_bytes == 400
    cache.make_room(800)
    assert b"c" not in cache and cache.held_bytes == 200
    cache.keep(b"b", used)
    cache.make_room(1000)
    assert cache.held_bytes == cache.kept_bytes == 0


@pytest.mark.parametrize(("gib", "mib"), [(64, 1024), (16, 1024), (2, 128), (0, 0)])
def test_rows_take_a_part_of_a_small_machine_s_memory(gib: int, mib: int) -> None:
    limits = RowLimits.of(gib << 30)
    assert limits.held_bytes == mib << 20 and limits.kept_bytes == mib << 18


def for_owner(owner: str, work: Coroutine[Any, Any, _Value]) -> asyncio.Task[_Value]:
    async def run() -> _Value:
        current_owner.set(owner)
        return await work

    return asyncio.create_task(run())


async def test_an_image_of_two_owners_is_encoded_in_the_turn_of_the_one_who_need_not_wait(tmp_path: Path) -> None:
    async with seeing(tmp_path) as (vision, encoder, _):
        encoder.gate.clear()
        busy = for_owner("one", spans_of(vision, FIRST))
        await until(lambda: encoder.images == 1)
        waits = for_owner("one", spans_of(vision, SECOND))
        await until(lambda: len(vision._encoding) == 2)
        assert encoder.images == 1
        other = for_owner("two", spans_of(vision, SECOND))
        await until(lambda: encoder.images == 2)
        assert encoder.owners == [["one"], ["two", "one"]]
        waits.cancel()
        encoder.gate.set()
        assert await other and await busy and encoder.images == 2


async def test_an_owner_whose_rows_fill_the_memory_gives_way_to_others(tmp_path: Path) -> None:
    """Checks that no request waits without an end and that none is refused."""
    size, n_bytes = await _sizes(tmp_path)
    images = [png(number) for number in range(6)]
    async with seeing(tmp_path, limits=RowLimits(0, 2 * size + n_bytes)) as (vision, encoder, _):
        held = [RowLeases(), RowLeases()]
        for leases, image in zip(held, images, strict=False):
            await for_owner("one", spans_of(vision, image, leases=leases))
        more = [for_owner("one", spans_of(vision, image, leases=RowLeases())) for image in images[2:4]]
        await until(lambda: len(vision._rows.line) == 2)
        other = for_owner("two", spans_of(vision, images[4], leases=RowLeases()))
        await until(lambda: len(vision._rows.line) == 3)
        assert encoder.images == 2
        held[0].close()  # the first waiting request continues
        _, (last,) = await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
        held[1].close()
        async with asyncio.timeout(60):
            await other
        assert [owners[0] for owners in encoder.owners] == ["one"] * 3 + ["two"] and not last.done()
        last.cancel()
        await asyncio.wait([last])
        assert not vision._rows.line.is_busy


async def test_requests_that_need_the_memory_of_each_other_end(tmp_path: Path) -> None:
    """Checks that requests which fit alone all end, since a waiting request holds no memory."""
    size, n_bytes = await _sizes(tmp_path)
    sets = [[png(10 * owner + number) for number in range(3)] for owner in range(4)]
    async with seeing(tmp_path, limits=RowLimits(0, 3 * size + n_bytes)) as (vision, _, _projector):
        tasks = [for_owner(str(number % 3), spans_of(vision, *images)) for number, images in enumerate(sets)]
        async with asyncio.timeout(60):
            for images, spans in zip(sets, await asyncio.gather(*tasks), strict=True):
                alone = await spans_of(vision, *images)
                assert [span.rows.tobytes() for span in spans] == [span.rows.tobytes() for span in alone]
        assert not vision._rows.held_bytes and not vision._rows.owned.held
