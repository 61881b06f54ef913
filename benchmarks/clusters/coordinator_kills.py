"""Kills the coordinator while clients stream, and compares every answer with an undisturbed run's.

    python benchmarks/clusters/coordinator_kills.py MODEL.gguf [--kills 25] [--streams 32] [--seed N]
        [--variants local static local+standby static+standby]

Each variant gets so many kills. Without a standby the coordinator is started again at once. Requests are greedy and
sampled, with penalties, DRY, Mirostat, several choices and top logprobs, short and long, completions and chats.

Prints a table: requests that ended with errors, tokens lost or changed (ids and logprob bits), events that were
duplicated or skipped at the clients, which resume, and how long clients waited: from a kill to the next token of any
stream, the start of Python, of the workers (local) and the load included.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from running import Bench, Layout, running

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.tools.chaos.load import Requests, Streams
from llamaclust.tools.chaos.tally import Tally, p99

_BETWEEN_S = (0.3, 2.0)
_CONTEXT_TOKENS = 512
_ON_THEIR_WAY_S = 0.05
_PAUSE_S = 60.0
_VARIANTS = ("local", "static", "local+standby", "static+standby")


@dataclass(slots=True)
class Outcome:
    """Of one variant."""

    tally: Tally
    pauses_s: list[float] = field(default_factory=list)

    @property
    def is_intact(self) -> bool:
        return self.tally.compared.is_intact and not self.tally.errors

    def row(self, variant: str) -> str:
        compared, pauses = self.tally.compared, self.pauses_s or [0.0]
        counts = [len(self.pauses_s), compared.answers, compared.tokens, self.tally.errors.total()]
        counts += [compared.lost, compared.changed, compared.misplaced]
        times = (median(pauses), p99(pauses), max(pauses))
        return f"{variant:16}" + "".join(f"{count:10}" for count in counts) + "".join(f"{s:9.2f}" for s in times)


class Kills:
    """Kills of one cluster's coordinator."""

    def __init__(
        self, bench: Bench, coordinator: subprocess.Popen[bytes], load: Streams, *, with_standby: bool
    ) -> None:
        self._bench = bench
        self._coordinator = coordinator
        self._standby: subprocess.Popen[bytes] | None = None
        self._load = load
        self._with_standby = with_standby

    async def once(self, wait_s: float) -> float:
        """Seconds until clients got tokens again."""
        if self._with_standby:
            self._standby = await self._bench.standby()
        await asyncio.sleep(wait_s)
        self._coordinator.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        self._coordinator.wait()
        self._coordinator = self._standby or self._bench.up()
        await self._bench.ready(self._coordinator)
        while self._load.last_token_s < killed_s + _ON_THEIR_WAY_S:
            if time.monotonic() > killed_s + _PAUSE_S:
                raise SystemExit(f"no token within {_PAUSE_S:g} s of a kill: {self._bench.log[-2000:]}")
            await asyncio.sleep(0.005)
        return self._load.last_token_s - killed_s


async def run(model: Path, variant: str, seed: int, kills: int, streams: int, workers: int) -> Outcome:
    source, launcher = Random(f"{seed} {variant}"), variant.partition("+")[0]
    keys = {"context_length": _CONTEXT_TOKENS, "max_sequences": 2 * streams, "timeouts": {"request": "30min"}}
    outcome, done = Outcome(Tally(seed)), asyncio.Event()
    layout = Layout(launcher=launcher, workers=workers, keys=keys)
    async with running(model, layout) as (bench, coordinator), AsyncClient(bench.api) as client:
        load = Streams(client, Requests(), outcome.tally)
        await load.undisturbed(streams)
        tasks = asyncio.gather(*(load.repeat(number, done) for number in range(streams)))
        sequence = Kills(bench, coordinator, load, with_standby="standby" in variant)
        for _ in range(kills):
            outcome.pauses_s.append(await sequence.once(source.uniform(*_BETWEEN_S)))
        done.set()
        await tasks
    return outcome


def measure(model: Path, variants: Sequence[str], seed: int, kills: int, streams: int, workers: int) -> bool:
    heads = ("kills", "answers", "tokens", "errors", "lost", "changed", "misplaced")
    print(f"seed {seed}, {workers} workers, {streams} streams; pauses in seconds")
    print(f"{'':16}" + "".join(f"{head:>10}" for head in heads) + f"{'median':>9}{'p99':>9}{'longest':>9}", flush=True)
    outcomes = {}
    for variant in variants:
        outcomes[variant] = asyncio.run(run(model, variant, seed, kills, streams, workers))
        print(outcomes[variant].row(variant), flush=True)
        for error, count in outcomes[variant].tally.errors.most_common(3):
            print(f"  {count} answers ended with: {error}")
    pauses = [seconds for outcome in outcomes.values() for seconds in outcome.pauses_s]
    is_intact = all(outcome.is_intact for outcome in outcomes.values())
    result = "nothing lost, nothing changed" if is_intact else "LOST OR CHANGED"
    print(f"{result}: {len(pauses)} kills; pause: median {median(pauses):.2f}, p99 {p99(pauses):.2f} s")
    return is_intact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--variants", nargs="+", choices=_VARIANTS, default=_VARIANTS)
    parser.add_argument("--kills", type=int, default=25, help="of each variant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--workers", type=int, default=3)
    given = parser.parse_args()
    if not measure(given.model, given.variants, given.seed, given.kills, given.streams, given.workers):
        sys.exit(1)


if __name__ == "__main__":
    main()
