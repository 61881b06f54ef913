"""Tests of a killed coordinator while a group serves: members keep their portions, and clients get the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import CommandLine
from support.clusters.static_cluster import join_port, logged, named, start_coordinator, start_worker
from support.clusters.streamed_answers import STREAMS, TOKENS, answers, undisturbed
from support.models.tiny_model import build_tiny_model
from support.network.loopback import free_port
from support.wire.group_links import needs_tls

pytestmark = needs_tls

PLANS: dict[str, list[dict[str, Any]]] = {
    "one group": [{"workers": ["a", "b"], "layers": [0, 4], "shares": [2, 1]}],
    "a group and a worker": [
        {"workers": ["a", "b"], "layers": [0, 3], "shares": [1, 1]},
        {"worker": "c", "layers": [3, 4]},
    ],
    "a worker and a group": [
        {"worker": "c", "layers": [0, 1]},
        {"workers": ["b", "a"], "layers": [1, 4], "shares": [1, 1]},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return build_tiny_model(folder / "tiny.gguf", layers=4, quant_type=QuantType.Q8_0, vocabulary=320)


def names_of(plan: Sequence[dict[str, Any]]) -> list[str]:
    return sorted(name for entry in plan for name in entry.get("workers", [entry.get("worker")]))


@pytest.mark.parametrize("plan", PLANS)
async def test_portions_are_kept_until_the_next_coordinator(line: CommandLine, model: Path, plan: str) -> None:
    with line.cluster(model, "alone", context_length=1280) as alone:
        expected = await undisturbed(alone.api, model)
    names, port, api = names_of(PLANS[plan]), free_port(), f"127.0.0.1:{free_port()}"
    keys: dict[str, Any] = {
        "join": {"listen": f"127.0.0.1:{port}", "members": "127.0.0.1:0"},
        "listen": api,
        "context_length": 1280,
        "kv_memory": "8MiB",
        "workers": named(*names),
        "plan": PLANS[plan],
        "timeouts": {"worker": "60s"},
    }
    coordinator = start_coordinator(line, model, **keys)
    join_port(coordinator)
    workers = {name: start_worker(line, port, name) for name in names}
    await asyncio.to_thread(coordinator.says, "tiny is ready")
    arrived = [0] * STREAMS
    asking = asyncio.create_task(answers(f"http://{api}", arrived))
    for ends in (1, 2):
        async with asyncio.timeout(120):
            while sum(arrived) < ends * STREAMS * TOKENS // 4:  # noqa: ASYNC110  counted by other tasks
                await asyncio.sleep(0.001)
        await asyncio.to_thread(coordinator.kill)
        for worker in workers.values():
            await asyncio.to_thread(logged, worker, "weights kept", ends)
        coordinator = await asyncio.to_thread(start_coordinator, line, model, **keys)
        await asyncio.to_thread(coordinator.says, "tiny is ready")
        for worker in workers.values():
            await asyncio.to_thread(logged, worker, "its weights were kept", ends)
        assert ": loading" not in coordinator.err.read_text()
    async with asyncio.timeout(240):
        assert await asking == expected
    assert line.run("down").code == 0
    for worker in workers.values():
        assert (await asyncio.to_thread(worker.wait)).code == 0
