"""A coordinator that is killed: its requests go on where it is started again, and clients see no difference."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import CommandLine, command_line
from support.clusters.streamed_answers import STREAMS, TOKENS, answers
from support.models.tiny_model import build_tiny_model
from support.seed import SEED


@pytest.fixture
def line() -> Iterator[CommandLine]:
    with command_line() as opened:
        yield opened


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny.gguf", layers=4, quant_type=QuantType.Q8_0, vocabulary=320)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("with_standby", [False, True])
async def test_requests_outlive_a_killed_coordinator(line: CommandLine, model: Path, with_standby: bool) -> None:
    drawn = random.Random(SEED)
    port = free_port()
    keys: dict[str, Any] = {"listen": f"127.0.0.1:{port}", "context_length": 512}
    with line.cluster(model, **keys) as cluster:
        undisturbed = await answers(cluster.api, [0] * STREAMS)
        arrived = [0] * STREAMS
        asking = asyncio.create_task(answers(cluster.api, arrived))
        for _ in range(2):
            if with_standby:
                again = await asyncio.to_thread(line.start, "up", line.cluster_file(model, "tiny", **keys), "--standby")
                await asyncio.to_thread(again.says, "this standby takes over")
            so_far = sum(arrived)
            wanted = so_far + drawn.randrange(1, STREAMS * TOKENS // 4)
            async with asyncio.timeout(60):
                while sum(arrived) < wanted and not asking.done():  # noqa: ASYNC110  counted by other tasks
                    await asyncio.sleep(0.001)
            os.kill(json.loads((line.cluster_dir("tiny") / "cluster.json").read_text())["pid"], signal.SIGKILL)
            if not with_standby:
                again = await asyncio.to_thread(line.start, "up", line.cluster_file(model, "tiny", **keys))
            await asyncio.to_thread(again.says, "tiny is ready")
        async with asyncio.timeout(120):
            assert await asking == undisturbed
        assert line.run("down").code == 0
        assert (line.cluster_dir("tiny") / "requests.journal").stat().st_size == 0


def test_a_standby_ends_with_a_cluster_that_is_stopped_in_order(line: CommandLine, model: Path) -> None:
    with line.cluster(model) as cluster:
        standby = line.start("up", line.cluster_file(model), "--standby")
        standby.says("this standby takes over")
        assert line.run("down").code == 0
        assert cluster.command.wait().code == 0
        done = standby.wait()
        assert done.code == 0 and "tiny was stopped; its standby ends as well" in done.err


def test_a_standby_is_not_detached(line: CommandLine, model: Path) -> None:
    assert (
        "--standby: cannot be used together with --detach"
        in line.run("up", line.cluster_file(model), "--standby", "-d").error
    )
