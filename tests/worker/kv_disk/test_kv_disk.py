"""Tests of requests for KV blocks on disk that a worker's folder cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.wire.control.kv_disk import FindKv, SaveKv, joined
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.kv_disk import KvDisk

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
