"""How long answers of four tokens take under the first grammars of a fresh cluster, and later ones.

    python benchmarks/clusters/first_forms.py [MODEL.gguf] [--starts 3]

Without a model: a small one of random weights with a vocabulary of 262,144 words. The first grammar prepares the
vocabulary where grammars are checked, and in the last stage.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx
import psutil
from running import Layout, resident_mib, running

_OBJECT: Final = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
_FORMS: Final[tuple[dict[str, Any], ...]] = (
    {"guided_choice": ["yes", "no"]},
    {"guided_choice": ["true", "false"]},
    {"guided_regex": "[ab]{3}"},
    {"json_schema": _OBJECT},
    {"response_format": {"type": "json_object"}},
    {"grammar": 'root ::= "x" | "y"'},
    {"guided_choice": [f"text {number}" for number in range(100)]},
)


def large_vocabulary_model(path: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from support.chat.large_vocabulary import build_large_vocabulary_model

    return build_large_vocabulary_model(path)


async def measure(model: Path) -> None:
    async with (
        running(model, Layout(workers=1)) as (bench, coordinator),
        httpx.AsyncClient(base_url=bench.api, trust_env=False, timeout=120.0) as client,
    ):
        before_mib, _ = used(coordinator.pid)
        for form in _FORMS:
            began_s, (_, before_s) = time.perf_counter(), used(coordinator.pid)
            reply = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, **form})
            taken_s, (mib, after_s) = time.perf_counter() - began_s, used(coordinator.pid)
            times = f"{1000 * taken_s:6.0f} ms, {1000 * (after_s - before_s):6.0f} ms of processors"
            print(f"{times}, status {reply.status_code}: {next(iter(form))}", flush=True)
        print(f"memory of all processes: {before_mib:.0f} MiB before, {mib:.0f} MiB after")


def used(coordinator: int) -> tuple[float, float]:
    """MiB and seconds of processors of a coordinator and its processes."""
    processes = [psutil.Process(coordinator), *psutil.Process(coordinator).children(recursive=True)]
    seconds = sum(sum(process.cpu_times()[:2]) for process in processes)
    return sum(resident_mib(process.pid) for process in processes), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--starts", type=int, default=3)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        model = given.model or large_vocabulary_model(Path(folder) / "large.gguf")
        for _ in range(given.starts):
            asyncio.run(measure(model))


if __name__ == "__main__":
    main()
