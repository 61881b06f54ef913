"""Resident memory of a coordinator, which holds no weights, beside that of its workers.

    python benchmarks/coordinator_memory.py MODEL.gguf [MODEL.gguf ...] [--workers 2] [--requests 32] [--tokens 8]

Starts `llamaclust up` for each model, asks for completions, all at once, and prints MiB after the start, at most during
the load, and after it. Exits with 1 where the coordinator ever took more than `--most` MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import yaml

_START_S = 600.0
_LOOK_S = 0.02
_PROMPT_WORDS = 40
_SPEED = {"threads": 1, "memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}


@contextmanager
def cluster(model: Path, workers: int) -> Iterator[tuple[str, psutil.Process]]:
    """Its API's address and the coordinator's process."""
    with tempfile.TemporaryDirectory(prefix="llamaclust-memory-") as folder:
        values = {
            "name": "memory",
            "model": str(model.resolve()),
            "listen": "127.0.0.1:0",
            "context_length": 512,
            "workers": [{"name": name, **_SPEED} for name in "abcdefgh"[:workers]],
            "objective": "throughput",
        }
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump(values))
        environment = os.environ | {"LLAMACLUST_STATE_DIR": folder, "LLAMACLUST_CACHE_SIZE": "0"}
        command = [sys.executable, "-P", "-m", "llamaclust", "up", str(file)]
        with (Path(folder) / "err").open("wb") as err:
            process = subprocess.Popen(command, env=environment, stderr=err, start_new_session=True)
        try:
            record = Path(folder) / "memory" / "cluster.json"
            end_s = time.monotonic() + _START_S
            while not (record.exists() and b"is ready" in (Path(folder) / "err").read_bytes()):
                if process.poll() is not None or time.monotonic() > end_s:
                    raise SystemExit((Path(folder) / "err").read_text())
                time.sleep(0.1)
            yield json.loads(record.read_text())["api"], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / (1 << 20)


async def load(api: str, requests: int, tokens: int) -> None:
    """Completions with prompts of their own, streamed or not."""
    async with httpx.AsyncClient(base_url=api, timeout=600.0, limits=httpx.Limits(max_connections=requests)) as client:

        async def complete(number: int) -> None:
            prompt = " ".join(f"word {number} {i}" for i in range(_PROMPT_WORDS))
            body = {"prompt": prompt, "max_tokens": tokens, "stream": number % 2 == 0, "logprobs": 2}
            (await client.post("/v1/completions", json=body)).raise_for_status()

        await asyncio.gather(*map(complete, range(requests)))


async def peak_during(asking: Coroutine[None, None, None], process: psutil.Process) -> float:
    work, most = asyncio.create_task(asking), mib(process)
    while not work.done():
        await asyncio.sleep(_LOOK_S)
        most = max(most, mib(process))
    await work
    return most


def measure(model: Path, workers: int, requests: int, tokens: int) -> float:
    """The most that the coordinator took, in MiB."""
    with cluster(model, workers) as (api, process):
        idle = mib(process)
        peak = asyncio.run(peak_during(load(api, requests, tokens), process))
        others = ", ".join(f"{mib(child):.0f}" for child in process.children())
        size = model.stat().st_size / (1 << 20)
        print(
            f"{model.name} ({size:.0f} MiB): coordinator {idle:.0f} MiB after the start, {peak:.0f} at most with "
            f"{requests} requests, {mib(process):.0f} after them; workers {others}"
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
    most = [measure(model, given.workers, given.requests, given.tokens) for model in given.models]
    if max(most) > given.most:
        raise SystemExit(f"a coordinator took {max(most):.0f} MiB, {given.most:.0f} are wanted at most")


if __name__ == "__main__":
    main()
