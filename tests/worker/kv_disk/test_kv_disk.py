"""Tests of requests for KV blocks on disk that a worker does not serve."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import DeviceLostError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.groups.portion import Portion
from llamaclust.model.loader import Model
from llamaclust.wire.control.kv_disk import FindKv, SaveKv, joined
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.kv_disk import KvDisk
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner
from support.models.tiny_model import build_tiny_model

KEYS = joined([bytes(32)])


class Program:
    start = 0


class Runner:
    """A `StageRunner` reduced to the attributes that are read."""

    kv_content = "ab" * 32
    kv_layers = ((np.zeros((4, 8), np.uint8),),)
    limits = StageLimits(max_batch_tokens=1, max_outputs=1, max_sequences=1, max_context_tokens=64, kv_blocks=4)
    program = Program()


async def test_a_folder_that_others_may_enter_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o755)
    disk, runner = KvDisk(KvFolder(folder, 1 << 20)), Runner()
    stage: Any = runner

    async def saved() -> int:
        assert (await disk.answer(FindKv(1, KEYS), stage)).blocks == 0
        return (await disk.answer(SaveKv(1, KEYS, (1,)), stage)).blocks

    assert [await saved() for _ in range(3)] == [0, 0, 0]
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("llamaclust")]
    assert line == f"KV memory is not kept on disk: {folder}: other users may enter the folder (mode 755)"
    folder.chmod(0o700)
    assert await saved() == 1


@pytest.mark.parametrize(("portion", "saved"), [(None, 1), (Portion((1, 1), 0), 0), (Portion((1, 1), 1), 0)], ids=str)
async def test_a_groups_member_keeps_no_blocks(tmp_path: Path, portion: Portion | None, saved: int) -> None:
    options = StageOptions(manifest="ab" * 32, portion=portion)
    with Model.open(build_tiny_model(tmp_path / "m.gguf", layers=1)) as model:
        stage = StageRunner(CpuBackend(1), model, 0, 1, Runner.limits, options)
        disk = KvDisk(KvFolder(tmp_path / "kv", 1 << 20))
        assert (await disk.answer(SaveKv(1, KEYS, (1,)), stage)).blocks == saved
        assert (await disk.answer(FindKv(1, KEYS), stage)).blocks == saved
        stage.close()


async def test_a_disk_that_does_not_answer_ends_the_worker(tmp_path: Path) -> None:
    """A load must not wait for it, and must not use the memory of a job that may still write to it."""
    disk, may_end = KvDisk(KvFolder(tmp_path / "kv", 1 << 20)), Event()
    await disk.idle(60.0)
    hanging = disk._reader.submit(may_end.wait)
    try:
        with pytest.raises(DeviceLostError, match=r"kv_disk.* took longer than 0.05 s, so this worker process ends"):
            await disk.idle(0.05)
    finally:
        may_end.set()
    assert hanging.result(60.0)
    await disk.idle(60.0)
