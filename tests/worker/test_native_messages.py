"""Stages of a real cluster read the messages of plain requests natively: each of them, whatever its answers say."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Answer, config, generations, model_in, recovering, undisturbed
from support.seed import SEED

TOKENS = 40
_COUNTED = """
# Runs in every process that the test starts: a worker writes a letter for each message that it reads.
import os, sys

if "--name" in sys.orig_argv:
    from llamaclust.worker.stage.arrival import Arrival
    from llamaclust.worker.stage.step_inputs import StepInputs

    file = os.open("FOLDER/" + sys.orig_argv[sys.orig_argv.index("--name") + 1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def count(kind, native, codec):
        read = kind.read

        def counted(*arguments):
            message = read(*arguments)
            os.write(file, native if message.native is not None else codec)
            return message

        kind.read = counted

    count(Arrival, b"F", b"f")
    count(StepInputs, b"I", b"i")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def requests() -> tuple[GenerationRequest, ...]:
    print(f"seed {SEED}")
    return generations(SEED, TOKENS)


@pytest.fixture(scope="module")
def expected(model: Path, requests: tuple[GenerationRequest, ...]) -> list[Answer]:
    return undisturbed(model, requests)


@pytest.mark.parametrize("workers", [1, 2])
async def test_plain_requests_are_read_natively(
    workers: int,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = tmp_path / "counts"
    counts.mkdir()
    (tmp_path / "sitecustomize.py").write_text(_COUNTED.replace("FOLDER", str(counts)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), *filter(None, sys.path))))
    async with recovering(config(model, tmp_path, workers)) as run:
        assert await asyncio.gather(*run.start(requests)) == expected
        read = {name: Counter((counts / name).read_text()) for name in "ab"[:workers]}
    last = "ab"[workers - 1]
    for name, counted in read.items():
        assert set(counted) == ({"F", "I"} if name == last else {"F"}), read
        assert counted["F"] >= TOKENS
    assert read[last]["I"] == read[last]["F"]
