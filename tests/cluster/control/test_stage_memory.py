"""Checks that a coordinator's memory stays small for any model, also while it serves: it holds no weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from support.clusters.command_line import Cluster, command_line

MIB = 1 << 20
MOST_BYTES = 400 * MIB
REQUESTS = 16


def complete(cluster: Cluster, number: int) -> None:
    """Sends a request: every fourth one is a chat, every second one is streamed."""
    text, common = f"Tell me about number {number}. " * 20, {"max_tokens": 4, "stream": number % 2 == 0}
    if number % 4 == 0:
        reply = cluster.http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **common}
        )
    else:
        reply = cluster.http.post("/v1/completions", json={"prompt": text, "logprobs": 3, **common})
    assert reply.status_code == 200, reply.text


def test_a_coordinator_of_the_demo_model_stays_below_400_mib(demo_model: Path) -> None:
    with command_line() as line, line.cluster(demo_model) as cluster:
        coordinator = psutil.Process(cluster.pid)
        idle_bytes = coordinator.memory_info().rss
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda number: complete(cluster, number), range(REQUESTS)))
        busy_bytes = coordinator.memory_info().rss
        print(
            f"coordinator: {idle_bytes // MIB} MiB after the start, {busy_bytes // MIB} MiB after {REQUESTS} requests"
        )
        assert max(idle_bytes, busy_bytes) < MOST_BYTES
        assert line.run("down", "--cluster", cluster.name).code == 0
