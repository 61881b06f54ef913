"""1,000 hostile pictures: each is a picture or one line, in bounded memory."""

from __future__ import annotations

import resource
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
LIMITS = ImageLimits(wait_s=250.0, wall_s=120.0, start_s=120.0)
COUNT = 1000
MORE_BYTES = 300 << 20


def peak_bytes(preparation: ImagePreparation) -> int:
    """Returns the most memory that the first child had since it started."""
    status = Path(f"/proc/{preparation._preparers[0].child.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def refusal(preparation: ImagePreparation, picture: bytes) -> str:
    """Returns an empty text for a picture that is taken."""
    try:
        preparation.prepare(picture)
    except RequestError as error:
        assert str(error).isprintable() and len(str(error)) < 300, error
        assert "Error" not in str(error) and "ermitted" not in str(error) and "import" not in str(error), error
        return str(error)
    return ""


def test_mutated_pictures_are_taken_or_refused_in_one_line() -> None:
    print(f"LLAMACLUST_TEST_SEED={SEED}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: Counter[bool] = Counter()
    with ImagePreparation(SETTINGS, LIMITS) as preparation:
        refusal(preparation, png(5, 5))
        pid, start = preparation._preparers[0].child.pid, peak_bytes(preparation)
        for picture in mutations(Random(SEED), COUNT):
            results[bool(refusal(preparation, picture))] += 1
        assert preparation._preparers[0].child.pid == pid, "a picture ended the child"
        assert peak_bytes(preparation) < start + MORE_BYTES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_BYTES >> 10
    assert results[True] > COUNT // 10 and results[False] > COUNT // 10, results


@pytest.fixture(scope="module")
def preparation() -> Iterator[ImagePreparation]:
    with ImagePreparation(SETTINGS, LIMITS) as made:
        yield made


@pytest.mark.parametrize("name", chosen())
def test_chosen_pictures_are_refused_in_one_line(preparation: ImagePreparation, name: str) -> None:
    message = refusal(preparation, chosen()[name])
    assert message.startswith("the image was refused: ") and "; " in message, message
