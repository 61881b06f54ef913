"""Tests of a coordinator that is killed during answers about images: the answers continue after a restart."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.journal_records import Instant, read_journal
from support.clusters.command_line import CommandLine
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector
from support.network.loopback import free_port
from support.seed import SEED

TOKENS = 400
QUESTIONS: Sequence[Sequence[int]] = ((1,), (2, 1), (), (2,))
"""Seeds of the images in each question."""
Answer = list[tuple[int, bytes]]


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 44, 3), np.uint8))


async def answer(client: AsyncClient, number: int, arrived: list[int]) -> Answer:
    """Returns the tokens and logprob bits of an answer. Sets `arrived[number]` to the number of tokens so far."""
    content = [f"What is this, {number}?", *map(image, QUESTIONS[number])]
    options: dict[str, Any] = {"temperature": 0.9, "seed": number} if number % 2 else {}
    rows: Answer = []
    messages = [{"role": "user", "content": content}]
    async for chunk in client.chat(messages, stream=True, max_tokens=TOKENS, ignore_eos=True, **options):
        rows += [(row.token, struct.pack("<f", row.logprob)) for row in chunk.rows]
        arrived[number] = len(rows)
    return rows


async def answers(api: str, arrived: list[int]) -> list[Answer]:
    async with AsyncClient(api) as client:
        return [*await asyncio.gather(*(answer(client, number, arrived) for number in range(len(QUESTIONS))))]


async def test_answers_to_images_outlive_a_coordinator(line: CommandLine, tmp_path: Path) -> None:
    """The coordinator is killed twice, at random tokens after all streams have begun and before all have ended."""
    print(f"LLAMACLUST_TEST_SEED={SEED}")
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=4, hidden=TEXT_WIDTH, heads=4, context=4096)
    build_projector(tmp_path / "mmproj-tiny.gguf", "idefics3")
    keys: dict[str, Any] = {"listen": f"127.0.0.1:{free_port()}", "context_length": 2048}
    folder, drawn = ClusterDir(line.cluster_dir("tiny")), random.Random(SEED)
    with line.cluster(model, **keys) as cluster:
        expected = await answers(cluster.api, [0] * len(QUESTIONS))
        assert len({*map(tuple, expected)}) == len(QUESTIONS)
        arrived = [0] * len(QUESTIONS)
        asking = asyncio.create_task(answers(cluster.api, arrived))
        for _ in range(2):
            wanted = sum(arrived) + drawn.randrange(1, len(QUESTIONS) * TOKENS // 4)
            async with asyncio.timeout(60):
                while (sum(arrived) < wanted or not all(arrived)) and not asking.done():  # noqa: ASYNC110  counted by other tasks
                    await asyncio.sleep(0.001)
            assert not asking.done()
            record = folder.read_record()
            assert record is not None
            os.kill(record.pid, signal.SIGKILL)
            again = await asyncio.to_thread(line.start, "up", line.cluster_file(model, "tiny", **keys))
            await asyncio.to_thread(again.says, "tiny is ready")
        async with asyncio.timeout(120):
            assert await asking == expected
        assert line.run("down").code == 0
        assert len(read_journal(folder.journal, Instant.now())) <= arrived.count(TOKENS)
