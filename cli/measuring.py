"""What `bench` prints: progress on standard error, figures on standard output."""

from __future__ import annotations

import io
import json
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table

from llamaclust.cli.interrupts import heard_as_interrupts
from llamaclust.cli.terminal import printable
from llamaclust.tools.bench.bench import BenchReport, BenchTask, cores, run_bench
from llamaclust.wire.rpc.grpc_options import tune_grpc

_WIDE_COLUMNS = 400


def bar_on_stderr(*columns: ProgressColumn) -> Progress:
    """On standard error, where that is a terminal; gone at the end."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_bench(task: BenchTask, as_json: bool) -> None:
    """Prints a table, or one JSON object; on standard error what makes the figures doubtful."""
    if task.workers > 1:
        tune_grpc()
    with told_to_end(task.workers), bar_on_stderr(TextColumn("{task.description}"), BarColumn()) as bar:
        shown = bar.add_task("loading", total=task.steps)
        report = run_bench(task, lambda what: bar.update(shown, description=what, advance=1))
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        _print_table(_table(report))
    threads = task.threads_each * task.workers
    if threads > cores():
        _note(f"{threads} threads shared {cores()} cores: a thread a core is faster")
    load = report.other_load
    if load is not None and load.is_much and not as_json:
        stolen = f", other virtual machines {load.stolen:.1f}" if load.stolen >= 0.05 else ""
        busy = f"other programs used {load.others:.1f} of {load.cores} cores{stolen}"
        _note(f"{busy} meanwhile: on an idle machine the figures are higher")


def told_to_end(workers: int) -> AbstractContextManager[None]:
    """A cluster's folders and processes are tidied up, whichever signal ends it."""
    return heard_as_interrupts(signal.SIGTERM, signal.SIGHUP) if workers > 1 else nullcontext()


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _print_table(table: Table) -> None:
    """As wide as it is, without blanks at the ends of lines, where no terminal would break them."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(highlight=False, width=_WIDE_COLUMNS, file=io.StringIO())
    with wide.capture() as captured:
        wide.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _table(report: BenchReport) -> Table:
    task = report.task
    model = printable(task.model.stem)
    where = f"{task.workers} workers with {task.threads_each}" if task.workers > 1 else f"{task.threads_each}"
    device = f"{printable(report.gpu)} ({task.device}), " if report.gpu else ""
    title = f"{model} ({report.quant_type}), {device}{where} threads, {report.feature_level}, batch {task.batch}"
    best_of = "this GPU" if report.gpu else "this machine"
    table = Table("", "tokens", "tok/s", "achieved", best_of, "share", title=title, title_justify="left")
    prefill, decode = report.prefill_gmac_s, report.decode_gb_s
    peak, read = median(pair.limit for pair in report.prefills), median(pair.limit for pair in report.decodes)
    for name, tokens, rate, unit, done, best, share in (
        ("prefill", task.prompt, report.prefill_tok_s, "GMAC/s", prefill, peak, report.prefill_roofline),
        ("decode", task.generate, report.decode_tok_s, "GB/s", decode, read, report.decode_roofline),
    ):
        table.add_row(name, str(tokens), f"{rate:.1f}", f"{done:.2f} {unit}", f"{best:.2f} {unit}", f"{share:.0%}")
    return table
