"""The next images of a prompt give their memory to the present one."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

import pytest

from llamaclust.cluster.front.text.image_rows import RowCache, RowLimits, RowMemoryError
from llamaclust.cluster.front.text.images import ImageSource
from llamaclust.cluster.front.text.prefetch import Prefetch


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Tiles:
    nbytes: int


@pytest.mark.parametrize(("held_bytes", "is_enough"), [(220, True), (219, False)])
async def test_rows_get_the_memory_of_the_next_images(held_bytes: int, is_enough: bool) -> None:
    cache, begun = RowCache(RowLimits(0, held_bytes)), list[bytes]()

    async def begin(source: ImageSource) -> Tiles:
        begun.append(source.data)
        tiles = Tiles(100)
        cache.count_tiles(tiles)
        return tiles

    async def rows() -> int:
        with cache.reserving(120):
            return 120

    async with aclosing(Prefetch([ImageSource(bytes([at])) for at in range(3)], begin, cache)) as images:
        for _ in range(3):
            tiles = await images.next()
            if not is_enough:
                with pytest.raises(RowMemoryError):
                    await images.with_room(rows)
                break
            assert await images.with_room(rows) == 120
            del tiles
    assert not is_enough or (len({*begun}) == 3 and len(begun) > 3)
