"""Tests of the memory of images at a start: rows in the coordinator, and encoders that fit on no worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamaclust.cli.plans.plan import PlannedStart, planned
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.control import stage_memory
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.models import row_memory
from llamaclust.cluster.planner.format import plan_lines
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.worker.devices.encoder_limits import EncoderMemory
from support.clusters.recovering import answer_of, config, generations, recovering
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

ROWS_BYTES = 3 << 20
FREE_BYTES = 1 << 30
UNUSED = "images are not read: the encoder of images does not fit: "


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    """Makes a model with a projector beside it."""
    (folder := tmp_path / "models").mkdir()
    model = build_tiny_model(folder / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=2, context=512)
    build_projector(model.with_name("mmproj-m.gguf"), "idefics3")
    return model


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_memory, "encoder_bytes", lambda *_: EncoderMemory(1 << 50, 1 << 20))


def start_of(model: Path, **keys: object) -> PlannedStart:
    file = model.with_name("cluster.yaml")
    worker = {"name": "a", "threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}
    values = {"model": str(model), "state_dir": str(model.parent), "workers": [worker], **keys}
    file.write_text(json.dumps(values))
    return planned(load_config(file))


@pytest.mark.usefixtures("huge")
async def test_a_start_goes_on_without_an_encoder_that_nobody_chose(seeing: Path, tmp_path: Path) -> None:
    async with recovering(config(seeing, tmp_path, workers=1)) as run:
        (served,) = run.cluster.models
        assert served.engine.encoder is None and not served.supervisor.planner.reads_images
        assert [text for text in run.told if text.startswith(f"m: {UNUSED}") and f"{(1 << 30) + 1} MiB" in text]
        assert await answer_of(served.engine.submit(generations(1, tokens=4)[0]))


@pytest.mark.usefixtures("huge")
async def test_a_start_fails_without_a_chosen_encoder(seeing: Path, tmp_path: Path) -> None:
    chosen = str(seeing.with_name("mmproj-m.gguf"))
    with pytest.raises(InsufficientMemoryError, match="the encoder of images does not fit: "):
        async with recovering(config(seeing, tmp_path, workers=1, mmproj=chosen)):
            pass
    with pytest.raises(InsufficientMemoryError, match="the encoder of images does not fit: "):
        start_of(seeing, mmproj=chosen)


async def test_rows_are_bounded_by_the_machine(seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "available_memory_bytes", lambda: 16 * ROWS_BYTES)
    assert start_of(seeing).row_bytes == ROWS_BYTES and start_of(seeing, mmproj="off").row_bytes == 0
    monkeypatch.setattr(LocalLauncher, "free_memory_bytes", lambda _: FREE_BYTES)
    async with recovering(config(seeing, tmp_path, workers=1)) as run:
        (runner,) = run.cluster.pool.runners
        assert runner.planner.free_bytes == FREE_BYTES - ROWS_BYTES and runner.planner.reads_images
        assert run.cluster.row_limits.held_bytes == ROWS_BYTES


@pytest.mark.usefixtures("huge")
async def test_without_images_workers_have_the_memory_of_rows(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = start_of(seeing)
    assert start.row_bytes == 0 and [text for text in plan_lines(start.plan) if text.strip().startswith(UNUSED)]
    monkeypatch.setattr(LocalLauncher, "free_memory_bytes", lambda _: FREE_BYTES)
    async with recovering(config(seeing, tmp_path, workers=1)) as run:
        (runner,) = run.cluster.pool.runners
        assert runner.planner.free_bytes == FREE_BYTES
