"""Sends 1,000 hostile images to a served model: each error is one line, and other clients get the same answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
import psutil

from support.chat.image_requests import PATHS, body_of, error_of
from support.clusters.command_line import Cluster, CommandLine
from support.hostile_pictures import chosen, in_disguise, large_animations, mutations, samples
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector
from support.seed import SEED

COUNT = 1000
AT_ONCE = 8
MORE_BYTES = 300 << 20
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "text/html", "application/octet-stream")
OWN, OTHER = "sk-key-of-others", "sk-key-of-the-attacker"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Attack:
    path: str
    body: dict[str, Any]
    is_refused: bool  # True if the image must be refused.


def attacks(random: Random, model: str) -> Iterator[Attack]:
    """Yields COUNT requests in random order, on all APIs."""
    refused = [*chosen().values(), *in_disguise().values()]
    images = [(image, True) for image in refused] * (COUNT // 2 // len(refused))
    images += [(image, False) for image in large_animations().values()]
    images += [(image, False) for image in mutations(random, COUNT - len(images))]
    random.shuffle(images)
    for image, is_refused in images:
        path, is_streamed, media_type = random.choice(PATHS), random.random() < 0.5, random.choice(MEDIA_TYPES)
        body = body_of(path, image, model=model, stream=is_streamed, media_type=media_type)
        yield Attack(path, body, is_refused)


@dataclass(slots=True)
class Seen:
    """Replies to hostile images, answers to others, and the coordinator's memory."""

    statuses: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    during: dict[str, list[int]] = field(default_factory=lambda: {"image": [], "text": []})
    """Numbers of replies to attackers during each answer, by kind."""
    most_bytes: int = 0

    @property
    def replies(self) -> int:
        return self.statuses.total()


async def attack(http: httpx.AsyncClient, queue: Iterator[Attack], seen: Seen) -> None:
    for each in queue:
        reply = await http.post(each.path, json=each.body)
        message = error_of(reply.text)
        assert reply.status_code in (200, 400), (reply.status_code, reply.text)
        assert (reply.status_code == 400) <= bool(message), reply.text
        assert message.isprintable() and len(message) < 400, message
        assert message or not each.is_refused, each.body
        if not each.body["stream"]:
            assert (reply.status_code == 400) == bool(message), reply.text
        seen.statuses[400 if message else 200] += 1


def question(number: int) -> dict[str, Any]:
    """Returns a question with an image (odd numbers) or without one."""
    content: list[Any] = [{"type": "text", "text": f"What is this, {number}?"}]
    if number % 2:
        content = body_of(CHAT, samples()[number], model="", stream=False)["messages"][0]["content"]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "ignore_eos": True}


async def answer(http: httpx.AsyncClient, number: int) -> list[tuple[int, float]]:
    """Streams an answer. Returns its tokens and their logprobs."""
    more = {"logprobs": True, "stream": True, "return_token_ids": True, "temperature": 0.8, "seed": number}
    rows: list[tuple[int, float]] = []
    async with http.stream("POST", CHAT, json=question(number) | more) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                logprobs = (choice.get("logprobs") or {}).get("content") or ()
                rows += zip(choice.get("token_ids") or (), [each["logprob"] for each in logprobs], strict=True)
    assert len(rows) == 16
    return rows


async def repeat(http: httpx.AsyncClient, number: int, expected: list[tuple[int, float]], seen: Seen) -> None:
    while True:
        before = seen.replies
        assert await answer(http, number) == expected, number
        kind = "image" if number % 2 else "text"
        seen.during[kind].append(seen.replies - before)
        seen.answers[kind] += 1


async def watch(coordinator: psutil.Process, seen: Seen) -> None:
    while True:
        seen.most_bytes = max(seen.most_bytes, coordinator.memory_info().rss)
        await asyncio.sleep(0.02)


@asynccontextmanager
async def clients(api: str) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    options: Any = {"base_url": api, "timeout": 200.0, "trust_env": False}
    async with (
        httpx.AsyncClient(headers={"Authorization": f"Bearer {OWN}"}, **options) as own,
        httpx.AsyncClient(headers={"Authorization": f"Bearer {OTHER}"}, **options) as other,
    ):
        yield own, other


async def attacked(cluster: Cluster) -> Seen:
    numbers, seen, coordinator = range(4), Seen(), psutil.Process(cluster.pid)
    async with clients(cluster.api) as (own, other):
        model = (await own.get("/v1/models")).json()["data"][0]["id"]
        expected = [await answer(own, number) for number in numbers]
        queue, begun_bytes = iter(attacks(Random(SEED), model)), coordinator.memory_info().rss
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(repeat(own, number, expected[number], seen)) for number in numbers]
            others.append(group.create_task(watch(coordinator, seen)))
            async with asyncio.TaskGroup() as attackers:
                for _ in range(AT_ONCE):
                    attackers.create_task(attack(other, queue, seen))
            for task in others:
                task.cancel()
        assert [await answer(own, number) for number in numbers] == expected
    assert seen.most_bytes - begun_bytes < MORE_BYTES, (seen.most_bytes - begun_bytes) >> 20
    return seen


def test_hostile_images_change_nothing_for_others(line: CommandLine, tmp_path: Path) -> None:
    print(f"LLAMACLUST_TEST_SEED={SEED}")
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=2, hidden=TEXT_WIDTH, heads=4, ffn=96, context=4096)
    build_projector(tmp_path / "mmproj-tiny.gguf", "gemma3")
    keys = tmp_path / "keys"
    keys.write_text(f"{OWN}\n{OTHER}\n")
    keys.chmod(0o600)
    with line.cluster(model, context_length=2048, api_keys_file=str(keys)) as cluster:
        workers = {child.pid for child in cluster.processes}
        seen = asyncio.run(attacked(cluster))
        print(seen)
        assert workers <= {child.pid for child in cluster.processes}
    assert seen.replies == COUNT and seen.statuses[400] > COUNT // 2
    assert min(seen.answers.values()) > 10, seen
    assert all(median(each) < 10 * AT_ONCE for each in seen.during.values()), seen
