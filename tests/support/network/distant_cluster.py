"""A static cluster whose coordinator and workers each run on a host of a box, and requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from support.clusters.command_line import CommandLine, Running, command_line, eventually, float32
from support.network.box import Box

COORDINATOR = "coordinator"
TOKENS = 24
_API = "127.0.0.1:8080"
_ANSWER_S = 280.0
SPEED = {"memory_bandwidth_gb_s": 0.05, "int8_gmac_s": 0.5}
"""Speeds so low that every plan for throughput uses all workers, even if a busy machine makes measured links slow."""


@dataclass(frozen=True, slots=True)
class PlainRequest:
    prompt: str
    max_tokens: int
    seed: int | None = None  # None: greedy

    @property
    def body(self) -> dict[str, Any]:
        chosen = {"temperature": 0.0} if self.seed is None else {"temperature": 0.9, "seed": self.seed}
        wanted = {"logprobs": 0, "return_token_ids": True, "ignore_eos": True}
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, **chosen, **wanted}


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # float32

    def begin(self, tokens: int) -> Answer:
        """Returns the first tokens of the answer."""
        return Answer(self.token_ids[:tokens], self.logprobs[:tokens])


def eight(max_tokens: int) -> list[PlainRequest]:
    """Builds eight requests, greedy and seeded in turn, with prompts of some twenty to sixty tokens."""
    tale = (
        "Once upon a time, in a small town by the sea, there lived an old keeper of the lighthouse who counted ships."
    )
    return [
        PlainRequest(f"{number}. " + tale * (1 + number % 3), max_tokens, number if number % 2 else None)
        for number in range(8)
    ]


async def request_all(api: str, generations: Sequence[PlainRequest]) -> list[Answer]:
    """Sends all requests at once and returns the answers."""
    async with httpx.AsyncClient(base_url=api, timeout=_ANSWER_S, trust_env=False, verify=False) as http:
        replies = await asyncio.gather(
            *(http.post("/v1/completions", json=generation.body) for generation in generations)
        )
    answers = []
    for reply in replies:
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        answers.append(Answer(tuple(choice["token_ids"]), tuple(float32(choice["logprobs"]["token_logprobs"]))))
    return answers


def undisturbed(model: Path, generations: Sequence[PlainRequest]) -> list[Answer]:
    """Returns the answers of one worker and its coordinator without a box."""
    speed = [{"name": "alone", "threads": 1, **SPEED}]
    with command_line() as line, line.cluster(model, "alone", workers=speed, context_length=512) as cluster:
        answers = asyncio.run(request_all(cluster.api, generations))
    assert [len(answer.token_ids) for answer in answers] == [generation.max_tokens for generation in generations]
    return answers


@dataclass(frozen=True, slots=True)
class DistantCluster:
    box: Box
    line: CommandLine
    coordinator: Running
    workers: dict[str, Running]
    _asking: ThreadPoolExecutor

    def answers(self, generations: Sequence[PlainRequest]) -> list[Answer]:
        """Returns the answers that a client on the coordinator's host gets."""
        return self.box[COORDINATOR].call(lambda: asyncio.run(request_all(f"http://{_API}", generations)))

    def asked(self, generations: Sequence[PlainRequest]) -> Future[list[Answer]]:
        """Sends the requests in the background."""
        return self._asking.submit(self.answers, generations)

    def get(self, path: str) -> httpx.Response:
        def get() -> httpx.Response:
            return httpx.get(f"http://{_API}{path}", timeout=10.0, trust_env=False, verify=False)

        return self.box[COORDINATOR].call(get)

    def metric(self, line_start: str) -> float:
        """Sums the lines of /metrics that begin with `line_start`."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(line_start))

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get("/cluster").json()["status"]
        return status


def start_worker(box: Box, line: CommandLine, name: str, *options: str) -> Running:
    """Starts a worker. `options`: how it joins and where it listens; by default, at fixed addresses."""
    token = line.state_dir / ".trust" / "token"
    eventually(token.is_file, 60.0, "the join token")
    fixed = ("--join", f"{box[COORDINATOR].address}:7100", "--listen", f"{box[name].address}:7102")
    own = ("--name", name, "--threads", "1", *(options or fixed))
    return line.start("worker", "--token-file", token, *own, network=box[name].namespace)


@contextmanager
def distant_cluster(box: Box, model: Path, options: Sequence[str] = (), **keys: Any) -> Iterator[DistantCluster]:
    """Yields a ready cluster with a worker on each host except the coordinator's. `options`: see `start_worker`."""
    here = box[COORDINATOR].address
    names = [name for name in box.hosts if name != COORDINATOR]
    fixed = {
        "launcher": "static",
        "listen": _API,
        "join": {"listen": f"{here}:7100", "members": f"{here}:7101"},
        "workers": [{"name": name, **SPEED} for name in names],
        "objective": "throughput",
        "groups": "off",
        "context_length": 512,
        "prefix_cache": False,
    }
    with command_line() as line, ThreadPoolExecutor() as asking:
        file = line.cluster_file(model, "distant", **{**fixed, **keys})
        coordinator = line.start("up", file, network=box[COORDINATOR].namespace)
        try:
            workers = {name: start_worker(box, line, name, *options) for name in names}
            coordinator.says("distant is ready")
            yield DistantCluster(box, line, coordinator, workers, asking)
        finally:
            line.end_commands()
