"""The `chaos` command: injects faults into the user's own running cluster while it serves requests."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import ExitStack
from random import SystemRandom
from signal import SIGHUP, SIGTERM
from typing import TYPE_CHECKING, Annotated, Self

from typer import Exit, Option

from llamaclust.cli.interrupts import ends_at_once, signals_as_interrupts
from llamaclust.cli.options import Cluster
from llamaclust.cli.terminal import printable

if TYPE_CHECKING:
    from llamaclust.tools.chaos.run import ChaosSettings

_LINE_S = 5.0


def chaos(
    minutes: Annotated[
        float, Option(metavar="M", min=0.01, max=10_000.0, help="Minutes during which faults are injected.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        Option(metavar="N", min=0, help="Seed for choosing the faults and when they happen. Default: random."),
    ] = None,
    faults: Annotated[
        str | None,
        Option(
            metavar="KIND,...",
            help="Kinds of faults: kill, stop, drain, coordinator-kill, coordinator-stop, disk-full, partition, "
            "slow-link, fails, mute. Default: all that this cluster and machine allow.",
        ),
    ] = None,
    streams: Annotated[int, Option(metavar="K", min=1, max=64, help="Number of concurrent requests.")] = 8,
    coordinator: Annotated[
        bool,
        Option("--coordinator", help="Kill the coordinator even without a standby; another program must restart it."),
    ] = False,
    kill_joined: Annotated[
        bool,
        Option("--kill-joined", help="Also kill `llamaclust worker` processes; another program must restart them."),
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Run even if other clients have active requests.")] = False,
    cluster: Cluster = None,
) -> None:
    """Test your own running cluster: inject faults into its workers and coordinator under load; check every answer."""
    with ends_at_once():
        from llamaclust.cluster.config.environment import environment
        from llamaclust.tools.chaos.run import ChaosSettings
        from llamaclust.tools.chaos.schedule import fault_kinds
        from llamaclust.tools.chaos.targets import Permissions

    required = fault_kinds(faults) if faults is not None else frozenset()
    settings = ChaosSettings(
        state_dir=environment().state_dir,
        cluster=cluster,
        seed=SystemRandom().randrange(1 << 31) if seed is None else seed,
        duration_s=60.0 * minutes,
        streams=streams,
        permissions=Permissions(coordinator, kill_joined, required or fault_kinds()),
        required=required,
        with_other_requests=yes,
    )
    if not _run(settings):
        raise Exit(1)


def _run(settings: ChaosSettings) -> bool:
    """Runs the test, prints its verdict, and returns True if faults occurred and every answer was intact."""
    from llamaclust.tools.chaos.run import run_chaos
    from llamaclust.tools.chaos.tally import Tally

    tally, has_ended = Tally(settings.seed), False
    with signals_as_interrupts(SIGTERM, SIGHUP):
        try:
            with ChaosView() as view:
                asyncio.run(run_chaos(settings, tally, view))
            has_ended = True
        except KeyboardInterrupt:
            if tally.compared.is_intact:
                raise
        finally:
            if has_ended or tally.faults or tally.compared.answers:
                print(*map(printable, tally.verdict()), sep="\n", flush=True)
    return tally.is_success


class ChaosView:
    """Prints notices and progress on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._status = self._console.status("")
        self._stack = ExitStack()
        self._shown_s = -_LINE_S

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._stack.enter_context(self._status)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def line(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(printable(text))
        else:
            print(printable(text), file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        if self._console.is_terminal:
            self._status.update(printable(text))
        elif time.monotonic() - self._shown_s >= _LINE_S:
            self._shown_s = time.monotonic()
            self.line(text)
