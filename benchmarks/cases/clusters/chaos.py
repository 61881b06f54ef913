from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, running
from runner.options import chosen, existing, natural, positive

from llamaclust.core.errors import LlamaclustError
from llamaclust.model.loader import Model
from llamaclust.tools.chaos.load import meanwhile
from llamaclust.tools.chaos.run import ChaosSettings, run_chaos
from llamaclust.tools.chaos.schedule import FaultKind, fault_kinds
from llamaclust.tools.chaos.tally import Tally, p99
from llamaclust.tools.chaos.targets import Permissions

_LOOK_S = 0.1


@dataclass(frozen=True)
class Chaos(Case):
    """Injects the faults of `llamaclust chaos` into a new cluster. No answer may be lost or changed.
    A killed coordinator is restarted at once, or a standby takes over. With --group N, N workers hold the first two
    thirds of the layers together. One other worker holds the rest, so that no worker can replace another."""

    rounds = 1
    model: Path = argument("path of a .gguf", existing)
    minutes: float = option(5.0, "duration of the faults in minutes")
    faults: frozenset[FaultKind] = option(None, "kinds of faults, such as kill,stop (default: all)", fault_kinds)
    launcher: str = option(
        "local", "launcher of the cluster", chosen("launcher", {name: name for name in ("local", "static")})
    )
    workers: int = option(3, "number of workers, with one thread each", positive)
    group: int = option(0, "number of workers in the group that holds the first layers (0: no group)", natural)
    standby: bool = option(False, "run a standby coordinator")
    silence: float = option(1.0, "timeouts.worker in seconds (default of clusters: 5)")
    streams: int = option(32, "number of simultaneous streams", positive)
    seed: int = option(1, "seed of the faults")

    async def groups(self) -> AsyncIterator[Group]:
        timeouts = {"worker": f"{self.silence:g}s", "request": "30min"}
        keys = {
            "objective": "throughput",
            "context_length": 512,
            "max_sequences": 2 * self.streams,
            "timeouts": timeouts,
        }
        workers = self.group + 1 if self.group else self.workers
        keys |= {"plan": self._plan()} if self.group else {}
        tally = Tally(self.seed)
        layout = Layout(launcher=self.launcher, workers=workers, keys=keys)
        async with running(self.model, layout) as (bench, _), meanwhile([_keep_up(bench, with_standby=self.standby)]):
            yield Group("", {f"{self.launcher}, {workers} workers": partial(self._disturb, bench, tally)})
        for kind, pauses in tally.pauses.by_kind().items():
            yield Group("", {kind.value: partial(_pauses, tally.faults[kind], pauses)})
        for error, count in tally.errors.most_common(3):
            print(f"{count} answers ended with: {error}")
        if not tally.is_success or tally.errors:
            raise LlamaclustError(
                f"answers were lost or changed, requests failed, or nothing was tested; repeat with --seed {self.seed}"
            )

    def _plan(self) -> list[dict[str, object]]:
        with Model.open(self.model) as model:
            layers = model.layer_count
        *group, last = [*Layout(workers=self.group + 1).names]
        border = layers * 2 // 3
        return [{"workers": group, "layers": [0, border]}, {"worker": last, "layers": [border, layers]}]

    async def _disturb(self, bench: Bench, tally: Tally, turn: int) -> Measures:
        settings = ChaosSettings(
            state_dir=bench.directory.path.parent,
            cluster=None,
            seed=self.seed,
            duration_s=60.0 * self.minutes,
            streams=self.streams,
            permissions=Permissions(True, True, self.faults or fault_kinds()),
            required=self.faults or frozenset(),
            with_other_requests=False,
        )
        await run_chaos(settings, tally, _View())
        compared = tally.compared
        wrong = {"lost": compared.lost, "changed": compared.changed, "misplaced": compared.misplaced}
        return {"faults": tally.faults.total(), "answers": compared.answers, "tokens": compared.tokens, **wrong}


async def _pauses(faults: int, seconds: list[float], turn: int) -> Measures:
    ordered = sorted(seconds)
    return {"faults": faults, "median s": ordered[len(ordered) // 2], "p99 s": p99(seconds), "longest s": ordered[-1]}


async def _keep_up(bench: Bench, *, with_standby: bool) -> None:
    """Starts a coordinator, or a standby if `with_standby` is True, whenever one is missing."""
    while True:
        await asyncio.sleep(_LOOK_S)
        present = sum(process.poll() is None for process in bench.started)
        if present < (2 if with_standby else 1):
            bench.up(*(("--standby",) if with_standby else ()))


class _View:
    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, text: str) -> None: ...
