"""Resident memory of a coordinator, which holds no weights, beside that of its workers.

    python benchmarks/clusters/coordinator_memory.py MODEL.gguf [MODEL.gguf ...] [--workers 2] [--requests 32]
        [--tokens 8] [--most 400]

Starts a cluster of each model, sends completions, all at once, and prints MiB after the start, at most during the load,
and after it. Exits with 1 where a coordinator ever took more than `--most` MiB.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil
from running import Layout, resident_mib, running

_LOOK_S = 0.02
_PROMPT_WORDS = 40


async def load(api: str, requests: int, tokens: int) -> None:
    """Completions with prompts of their own, streamed or not."""
    async with httpx.AsyncClient(base_url=api, timeout=600.0, limits=httpx.Limits(max_connections=requests)) as client:

        async def complete(number: int) -> None:
            prompt = " ".join(f"word {number} {i}" for i in range(_PROMPT_WORDS))
            body = {"prompt": prompt, "max_tokens": tokens, "stream": number % 2 == 0, "logprobs": 2}
            (await client.post("/v1/completions", json=body)).raise_for_status()

        await asyncio.gather(*map(complete, range(requests)))


async def peak_during(load: Coroutine[None, None, None], pid: int) -> float:
    work, most = asyncio.create_task(load), 0.0
    while not work.done():
        most = max(most, resident_mib(pid))
        await asyncio.sleep(_LOOK_S)
    await work
    return most


async def measure(model: Path, size: float, workers: int, requests: int, tokens: int) -> float:
    """The most that the coordinator took, in MiB, as `size` is."""
    keys: dict[str, Any] = {"context_length": 512, "objective": "throughput"}
    async with running(model, Layout(workers=workers, keys=keys)) as (bench, process):
        idle = resident_mib(process.pid)
        peak = await peak_during(load(bench.api, requests, tokens), process.pid)
        others = ", ".join(f"{resident_mib(child.pid):.0f}" for child in psutil.Process(process.pid).children())
        print(
            f"{model.name} ({size:.0f} MiB): coordinator {idle:.0f} MiB after the start, {peak:.0f} at most with "
            f"{requests} requests, {resident_mib(process.pid):.0f} after them; workers {others}"
        )
        return max(idle, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--most", type=float, default=400.0, help="MiB")
    given = parser.parse_args()
    sizes = [(model, model.stat().st_size / (1 << 20)) for model in given.models]
    options = (given.workers, given.requests, given.tokens)
    most = [asyncio.run(measure(model, size, *options)) for model, size in sizes]
    if max(most) > given.most:
        raise SystemExit(f"a coordinator took {max(most):.0f} MiB, {given.most:.0f} are wanted at most")


if __name__ == "__main__":
    main()
