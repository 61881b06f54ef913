"""Tests of a killed coordinator: its requests continue after a restart, and clients get the same answers."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.journal_records import Instant, read_journal
from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import CommandLine
from support.clusters.streamed_answers import STREAMS, TOKENS, answers, undisturbed
from support.models.tiny_model import build_tiny_model
from support.network.loopback import free_port
from support.seed import SEED


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny.gguf", layers=4, quant_type=QuantType.Q8_0, vocabulary=320)


def end_coordinator(folder: ClusterDir, numbers: Sequence[signal.Signals]) -> None:
    record = folder.read_record()
    assert record is not None
    for number in numbers:  # Two equal signals may count as one.
        os.kill(record.pid, number)


@pytest.mark.promise
@pytest.mark.parametrize("end", ["kill", "kill with a standby", "stop at once"])
async def test_requests_outlive_a_coordinator(line: CommandLine, model: Path, end: str) -> None:
    """Requests also survive two stop signals. Answers that clients have completely read just before the kill may remain
    in the journal, which does not record that."""
    with_standby = end == "kill with a standby"
    numbers = [signal.SIGTERM, signal.SIGINT] if end == "stop at once" else [signal.SIGKILL]
    folder = ClusterDir(line.cluster_dir("tiny"))
    drawn = random.Random(SEED)
    port = free_port()
    keys: dict[str, Any] = {"listen": f"127.0.0.1:{port}", "context_length": 1280}
    with line.cluster(model, **keys) as cluster:
        expected = await undisturbed(cluster.api, model)
        arrived, answered = [0] * STREAMS, 0
        asking = asyncio.create_task(answers(cluster.api, arrived))
        for _ in range(2):
            if with_standby:
                again = await asyncio.to_thread(line.start, "up", line.cluster_file(model, "tiny", **keys), "--standby")
                await asyncio.to_thread(again.says, "this standby takes over")
            so_far = sum(arrived)
            wanted = so_far + drawn.randrange(1, STREAMS * TOKENS // 4)
            async with asyncio.timeout(60):
                while (sum(arrived) < wanted or not all(arrived)) and not asking.done():  # noqa: ASYNC110  counted by other tasks
                    await asyncio.sleep(0.001)
            await asyncio.to_thread(end_coordinator, folder, numbers)
            if end == "stop at once":
                assert await asyncio.to_thread(folder.ends_within, 20.0)
                assert not asking.done()
            if not with_standby:
                again = await asyncio.to_thread(line.start, "up", line.cluster_file(model, "tiny", **keys))
            await asyncio.to_thread(again.says, "tiny is ready")
            assert end != "stop at once" or "computed again" in again.err.read_text()
            answered = max(answered, arrived.count(TOKENS))
        async with asyncio.timeout(120):
            assert await asking == expected
        assert line.run("down").code == 0
        assert len(read_journal(folder.journal, Instant.now())) <= answered


@pytest.mark.parametrize(("memory", "more"), [("192MiB", "384MiB"), ("384MiB", "192MiB"), ("256MiB", "1GiB")])
async def test_a_coordinator_keeps_the_context_of_its_predecessor(
    line: CommandLine, tmp_path: Path, memory: str, more: str
) -> None:
    """The context is chosen by memory. With other memory, a start chooses another one only if no requests remain."""
    model = build_tiny_model(tmp_path / "long.gguf", layers=4, vocabulary=320, context=1 << 20)
    port, drawn = free_port(), random.Random(SEED)

    def keys(each: str) -> dict[str, Any]:
        speed = {"threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0, "memory": each}
        return {"listen": f"127.0.0.1:{port}", "workers": [{"name": name, **speed} for name in "ab"]}

    def context() -> int:
        (entry,) = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()["data"]
        return int(entry["max_model_len"])

    with line.cluster(model, **keys(memory)) as cluster:
        first, expected, arrived = context(), await undisturbed(cluster.api, model), [0] * STREAMS
        assert 4096 < first < 1 << 20
        asking = asyncio.create_task(answers(cluster.api, arrived))
        wanted = drawn.randrange(STREAMS, STREAMS * TOKENS // 2)
        async with asyncio.timeout(60):
            while sum(arrived) < wanted and not asking.done():  # noqa: ASYNC110  counted by other tasks
                await asyncio.sleep(0.001)
        await asyncio.to_thread(end_coordinator, ClusterDir(line.cluster_dir("tiny")), [signal.SIGKILL])
        again = await asyncio.to_thread(line.start, "up", line.cluster_file(model, "tiny", **keys(more)))
        await asyncio.to_thread(again.says, "tiny is ready")
        assert await asyncio.to_thread(context) == first
        async with asyncio.timeout(120):
            assert await asking == expected
        assert line.run("down").code == 0
    with line.cluster(model, **keys(more)):
        assert await asyncio.to_thread(context) != first


def test_a_standby_ends_with_a_cluster_that_is_stopped_in_order(line: CommandLine, model: Path) -> None:
    with line.cluster(model) as cluster:
        standby = line.start("up", line.cluster_file(model), "--standby")
        standby.says("this standby takes over")
        assert line.run("down").code == 0
        assert cluster.command.wait().code == 0
        done = standby.wait()
        assert done.code == 0 and "tiny was stopped, so this standby ends too" in done.err


def test_a_standby_is_not_detached(line: CommandLine, model: Path) -> None:
    assert (
        "--standby cannot be used together with --detach"
        in line.run("up", line.cluster_file(model), "--standby", "-d").error
    )
