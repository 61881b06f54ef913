"""Checks that each of 1,000 hostile images is decoded or refused in one line, with bounded memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from llamaclust.core.errors import RequestError
from llamaclust.model.images.preparation import ImageLimits, ImagePreparation
from llamaclust.model.images.settings import ImageSettings
from support.hostile_pictures import chosen, mutations, png
from support.seed import SEED

SETTINGS = ImageSettings("gemma3", 14, 1, image_size=28)
LIMITS = ImageLimits(max_pixels=2 << 20, wait_s=250.0, wall_s=120.0, start_s=120.0)
COUNT = 1000
MORE_BYTES = 64 << 20
"""Eight copies of the largest image with four bytes per pixel; the limit of a process is far higher."""


def peak_bytes(pid: int | None) -> int:
    """Returns the peak memory of a process since its start."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


async def refusal(preparation: ImagePreparation, picture: bytes) -> str:
    """Returns the error, or an empty text if the image is decoded."""
    try:
        await preparation.prepare(picture, SETTINGS)
    except RequestError as error:
        assert str(error).isprintable() and len(str(error)) < 300, error
        assert "Error" not in str(error) and "ermitted" not in str(error) and "import" not in str(error), error
        return str(error)
    return ""


async def test_mutated_pictures_are_taken_or_refused_in_one_line() -> None:
    print(f"LLAMACLUST_TEST_SEED={SEED}")
    results: Counter[bool] = Counter()
    async with ImagePreparation(LIMITS) as preparation:
        await refusal(preparation, png(5, 5))
        child = preparation._preparers[0].child
        pids = (child.pid, os.getpid())
        start = sum(map(peak_bytes, pids))
        for picture in mutations(Random(SEED), COUNT):
            results[bool(await refusal(preparation, picture))] += 1
        assert child.pid == pids[0], "a picture ended the child"
        assert [preparer.child.pid for preparer in preparation._preparers[1:]] == [None, None]
        assert sum(map(peak_bytes, pids)) < start + MORE_BYTES
    assert results[True] > COUNT // 10 and results[False] > COUNT // 10, results


@pytest.fixture(scope="module")
def preparation() -> Iterator[ImagePreparation]:
    made = ImagePreparation(LIMITS)
    yield made
    made.close()


@pytest.mark.parametrize("name", chosen())
async def test_chosen_pictures_are_refused_in_one_line(preparation: ImagePreparation, name: str) -> None:
    message = await refusal(preparation, chosen()[name])
    assert message.startswith("the image was refused: ") and "; " in message, message
