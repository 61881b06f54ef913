"""Two workers in memory control groups that hold one model each, killed and re-planned again and again.

    python benchmarks/clusters/memory_groups.py MODEL.gguf [--kills 20] [--spare 0.5] [--kv 128] [--streams 8]
        [--seed N] [--groups /sys/fs/cgroup/memory]

Each group is limited to the size of the model's file, KV memory (`--kv` MiB) and `--spare` GiB: either worker has to
take over all layers. Needs root, and control groups of version 1, or a folder of version 2 whose memory controller is
on; the groups are removed at the end. Answers are compared with the undisturbed ones.

Prints for each kill how long requests paused and how soon both workers had layers again, and in the end whether the
kernel killed a process for lack of memory, and whether a worker was lost that the benchmark did not kill.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from running import Bench, Layout, running

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.tools.chaos.load import Requests, Streams
from llamaclust.tools.chaos.tally import Tally

_NAMES = "ab"
_CONTEXT_TOKENS = 512
_BOTH_S = 120.0
_LOOK_S = 0.05
_BETWEEN_S = (0.5, 2.0)
_REMOVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Group:
    """A memory control group of this benchmark, below the mount of version 1 or a folder of version 2."""

    path: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words that run a command in it."""
        return ("/bin/sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh")

    @property
    def out_of_memory_kills(self) -> int:
        for name in ("memory.events", "memory.oom_control"):
            if (file := self.path / name).exists():
                return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])
        return 0

    @property
    def most_bytes(self) -> int:
        names = ("memory.peak", "memory.max_usage_in_bytes")
        return max(int(file.read_text()) for name in names if (file := self.path / name).exists())


@contextmanager
def memory_group(parent: Path, name: str, limit_bytes: int) -> Iterator[Group]:
    """Removed at the end, when its processes are gone. SystemExit where there can be none."""
    path = parent / f"llamaclust-bench-{os.getpid()}-{name}"
    try:
        path.mkdir()
    except OSError as error:
        raise SystemExit(f"{path}: no control group can be made: {error.strerror}") from None
    try:
        limit = next((path / file for file in ("memory.limit_in_bytes", "memory.max") if (path / file).exists()), None)
        if limit is None:
            raise SystemExit(f"{path}: has no memory controller; --groups: another folder of control groups")
        limit.write_text(str(limit_bytes))
        yield Group(path)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Processes leave a moment after their ends."""
    end_s = time.monotonic() + _REMOVAL_S
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(_LOOK_S)


async def both_serve(bench: Bench) -> Mapping[str, int]:
    """Process ids by name, once both workers have layers."""
    end_s = time.monotonic() + _BOTH_S
    while time.monotonic() < end_s:
        status = await bench.status()
        workers = status["workers"]
        if status["state"] == "ready" and all(worker["layers"] and any(worker["layers"]) for worker in workers):
            return {worker["name"]: worker["pid"] for worker in workers}
        await asyncio.sleep(_LOOK_S)
    raise SystemExit(f"no plan with both workers within {_BOTH_S:g} s: {bench.log[-3000:]}")


async def kill(bench: Bench, name: str) -> tuple[float, float]:
    """Seconds of the recovery, and until both workers have layers again."""
    pid = (await both_serve(bench))[name]
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    while True:
        if (await both_serve(bench))[name] != pid:  # else it is not noticed yet
            break
        await asyncio.sleep(_LOOK_S)
    both_s = time.monotonic() - killed_s
    recovered_s = (await bench.status())["recovery_seconds"][-1:]
    return (recovered_s or [0.0])[0], both_s


async def run(given: argparse.Namespace, groups: Mapping[str, Group]) -> bool:
    keys = {
        "context_length": _CONTEXT_TOKENS,
        "objective": "throughput",
        "kv_memory": f"{given.kv}MiB",
        "max_sequences": 2 * given.streams,
    }
    prefixes = {name: group.prefix for name, group in groups.items()}
    layout = Layout(launcher="static", workers=len(_NAMES), keys=keys, prefixes=prefixes)
    source, tally, done = Random(given.seed), Tally(given.seed), asyncio.Event()
    async with running(given.model, layout) as (bench, _), AsyncClient(bench.api) as client:
        load = Streams(client, Requests(), tally)
        await load.undisturbed(given.streams)
        tasks = asyncio.gather(*(load.repeat(number, done) for number in range(given.streams)))
        times = []
        for number in range(given.kills):
            await asyncio.sleep(source.uniform(*_BETWEEN_S))
            times.append(await kill(bench, name := _NAMES[number % len(_NAMES)]))
            print(
                f"{number + 1:4} {name}: recovered in {times[-1][0]:.2f} s, both serve after {times[-1][1]:.2f} s",
                flush=True,
            )
        done.set()
        await tasks
        losses = len(re.findall(r"^worker \w+ .*is lost: ", bench.log, re.MULTILINE))
    return verdict(given, tally, times, losses - given.kills, groups)


def verdict(
    given: argparse.Namespace,
    tally: Tally,
    times: list[tuple[float, float]],
    other_losses: int,
    groups: Mapping[str, Group],
) -> bool:
    killed = sum(group.out_of_memory_kills for group in groups.values())
    most = ", ".join(f"{name} {group.most_bytes / (1 << 20):.0f}" for name, group in groups.items())
    print(f"{given.kills} kills: recovered in {median(s for s, _ in times):.2f} s, both served after", end=" ")
    print(f"{median(s for _, s in times):.2f} s (medians; longest {max(s for _, s in times):.2f} s)")
    print(f"{tally.compared}; {tally.errors.total()} errors; most used: {most} MiB, page cache included")
    is_well = tally.compared.is_intact and not tally.errors and not killed and other_losses <= 0
    result = "as planned" if is_well else "NOT AS PLANNED"
    print(f"{result}: {killed} kills for lack of memory, {max(0, other_losses)} other losses, seed {given.seed}")
    return is_well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--spare", type=float, default=0.5, help="GiB")
    parser.add_argument("--kv", type=int, default=128, help="MiB")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--groups", type=Path, default=Path("/sys/fs/cgroup/memory"))
    given = parser.parse_args()
    limit_bytes = given.model.stat().st_size + (given.kv << 20) + round(given.spare * (1 << 30))
    print(f"seed {given.seed}, two groups of {limit_bytes >> 20} MiB, {given.streams} streams", flush=True)
    with ExitStack() as stack:
        groups = {name: stack.enter_context(memory_group(given.groups, name, limit_bytes)) for name in _NAMES}
        is_well = asyncio.run(run(given, groups))
    if not is_well:
        sys.exit(1)


if __name__ == "__main__":
    main()
