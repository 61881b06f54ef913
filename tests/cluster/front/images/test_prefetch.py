"""Checks that the next images of a prompt give their memory to the rows of the current one."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

import pytest

from llamaclust.cluster.front.text.image_rows import RowCache, RowLimits, RowMemoryError
from llamaclust.cluster.front.text.images import ImageSource
from llamaclust.cluster.front.text.prefetch import Prefetch
from llamaclust.core.errors import RequestError
from llamaclust.model.images.preparation import RefusedImageError


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    cache: RowCache
    nbytes: int = 100

    def release(self) -> None:
        self.cache.free(self.nbytes)


@pytest.mark.parametrize(("held_bytes", "is_enough"), [(220, True), (219, False)])
async def test_rows_get_the_memory_of_the_next_images(held_bytes: int, is_enough: bool) -> None:
    cache, begun = RowCache(RowLimits(0, held_bytes)), list[bytes]()

    async def begin(source: ImageSource) -> Tiles:
        begun.append(source.data)
        cache.use(100)
        return Tiles(cache)

    async def rows() -> int:
        cache.use(120)
        cache.free(120)
        return 120

    async def room(_: int, size: int) -> None:
        cache.make_room(size)

    async with aclosing(Prefetch([ImageSource(bytes([at])) for at in range(3)], begin, room)) as images:
        for _ in range(3):
            tiles = await images.next(0)
            if not is_enough:
                with pytest.raises(RowMemoryError):
                    await images.with_room(rows, tiles.nbytes)
                break
            assert await images.with_room(rows, tiles.nbytes) == 120
            tiles.release()
    assert not is_enough or cache.held_bytes == 0
    assert not is_enough or (len({*begun}) == 3 and len(begun) > 3)


@pytest.mark.parametrize(
    ("count", "refused", "named"), [(1, 0, "it is"), (3, 1, "image 2 of 3: it is"), (2, 0, "1 of 2")]
)
async def test_an_error_names_the_image(count: int, refused: int, named: str) -> None:
    cache = RowCache()

    async def begin(source: ImageSource) -> Tiles:
        if source.data == bytes([refused]):
            raise RefusedImageError("it is damaged")
        cache.use(100)
        return Tiles(cache)

    async def room(*_: int) -> None:
        raise AssertionError("memory is not short")

    async with aclosing(Prefetch([ImageSource(bytes([at])) for at in range(count)], begin, room)) as images:
        for _ in range(refused):
            (await images.next(0)).release()
        with pytest.raises(RequestError) as error:
            await images.next(0)
    assert named in str(error.value) and str(error.value).endswith("it is damaged") and not cache.held_bytes
