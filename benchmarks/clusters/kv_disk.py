"""Time to first token of a long shared prefix after a restart of everything, its KV memory read from disk, relative to
computing it.

    python benchmarks/clusters/kv_disk.py [MODEL] [--workers 2] [--threads 1] [--prefix 4000] [--repeats 3] [--damage]

Each prompt is the prefix and a few tokens of its own. The first cluster computes it and writes its KV memory; the
second one, all of its processes new, answers another prompt with the same prefix. The answers to the first prompt are
compared, ids and logprob bits. `--damage` flips one byte of each file before the second start. Times are the client's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

_PROGRAM = str(Path(sys.executable).parent / "llamaclust")
_DEADLINE_S = 600.0
_OWN_TOKENS = 8
_QUIET_S = 2.5
"""Nothing more is written for so long: two heartbeats."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds until the first token; ids and logprobs."""

    first_s: float
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    model: str
    workers: int
    threads: int
    context: int


@contextmanager
def cluster(setting: Setting, folder: str) -> Iterator[httpx.Client]:
    """Its API. All processes end with it; the cache folder stays."""
    environment = {**os.environ, "LLAMACLUST_STATE_DIR": folder}
    workers = ", ".join(
        f"{{name: w{index}, threads: {setting.threads}, kv_disk: 4GiB}}" for index in range(setting.workers)
    )
    values = (f"model={setting.model}", f"workers=[{workers}]", f"context_length={setting.context}")
    layers = () if setting.workers == 1 else ("objective=throughput",)
    options = [word for value in (*values, *layers, f"state_dir={folder}") for word in ("--set", value)]
    _output([_PROGRAM, "up", "--detach", *options, "--port", "0"], environment)
    try:
        api = json.loads(_output([_PROGRAM, "status", "--json"], environment))["api"]
        with httpx.Client(base_url=api, timeout=_DEADLINE_S, trust_env=False) as client:
            yield client
    finally:
        _output([_PROGRAM, "down"], environment)


def answer(client: httpx.Client, prompt: list[int], tokens: int = 8) -> Answer:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "stream": True}
    begun, first_s = time.perf_counter(), 0.0
    ids: list[int] = []
    logprobs: list[float] = []
    with client.stream("POST", "/v1/completions", json=body | {"return_token_ids": True}) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                first_s = first_s or time.perf_counter() - begun
                ids += choice.get("token_ids") or ()
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or ()
    return Answer(first_s, tuple(ids), tuple(logprobs))


def written(client: httpx.Client) -> None:
    """Returns when what is to be written is written."""
    before, since = -1.0, time.monotonic()
    while time.monotonic() - since < _QUIET_S:
        lines = client.get("/metrics").text.splitlines()
        name = "llamaclust_worker_kv_disk_written_bytes_total{"
        now = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.1)


def flip_bytes(folder: Path) -> int:
    """Of each file; how many."""
    paths = sorted(folder.glob("*.kv"))
    for path in paths:
        with path.open("r+b") as file:
            file.seek(-1 - path.stat().st_size // 3, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    return len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefix", type=int, default=4000, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--damage", action="store_true", help="flip a byte of each file before the restart")
    given: Any = parser.parse_args()
    source = random.Random(1)
    prefixes = [[source.randrange(20, 300) for _ in range(given.prefix)] for _ in range(given.repeats)]
    own = [[source.randrange(20, 300) for _ in range(_OWN_TOKENS)] for _ in range(2)]
    setting = Setting(given.model, given.workers, given.threads, given.prefix + 64)
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        kv = Path(folder) / "home" / "kv"
        home = os.environ.get("LLAMACLUST_HOME") or Path.home() / ".cache" / "llamaclust"
        _link_models(Path(home), kv.parent)
        os.environ["LLAMACLUST_HOME"] = str(kv.parent)
        with cluster(setting, folder) as client:
            answer(client, own[0])  # the first request of all also pays for what is made once
            cold = [answer(client, prefix + own[0]) for prefix in prefixes]
            written(client)
        size_mib = sum(path.stat().st_size for path in kv.glob("*.kv")) / (1 << 20)
        print(f"{size_mib:.0f} MiB written, {size_mib * 1024 / given.prefix / given.repeats:.1f} KiB a token")
        if given.damage:
            print(f"one byte of each of {flip_bytes(kv)} files is flipped")
        with cluster(setting, folder) as client:
            answer(client, own[0])
            warm = [answer(client, prefix + own[1]) for prefix in prefixes]
            again = [answer(client, prefix + own[0]) for prefix in prefixes]
    same = [(a.tokens, a.logprobs) == (b.tokens, b.logprobs) for a, b in zip(cold, again, strict=True)]
    ratios = [after.first_s / before.first_s for before, after in zip(cold, warm, strict=True)]
    for name, answers in (("computed", cold), ("after the restart", warm)):
        print(f"time to first token, {name}: " + ", ".join(f"{found.first_s:.3f}" for found in answers) + " s")
    print(
        f"ratio: {median(ratios):.3f} ({', '.join(f'{ratio:.3f}' for ratio in sorted(ratios))}); same bits: {all(same)}"
    )


def _link_models(home: Path, to: Path) -> None:
    """Models are those of the user."""
    to.mkdir()
    if (home / "models").is_dir():
        (to / "models").symlink_to(home / "models")


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    main()
