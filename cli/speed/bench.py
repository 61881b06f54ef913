"""The `bench` command: compares the speed of prefill and decode with the machine's limits."""

from __future__ import annotations

import io
import json
import sys
from itertools import count
from statistics import median
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llamaclust.cli.interrupts import ends_workers_cleanly
from llamaclust.cli.options import Json, KvTypeOption, LocalModel, Threads, Workers, option_value
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from llamaclust.tools.bench.bench import BenchReport, BenchTask


def known_device(devices: list[str], workers: int) -> str:
    """Parses --device. Raises UsageError for an unknown device, several GPUs, or a GPU for several workers."""
    from llamaclust.cluster.config.values import parse_device

    known = option_value("--device", parse_device, ",".join(devices) or "cpu")
    if "," in known or (known != "cpu" and workers > 1):
        raise UsageError("--device: give one GPU and --workers 1; to use several GPUs or GPU workers, start a cluster")
    return known


def bench(
    model: LocalModel,
    threads: Threads = None,
    prompt: Annotated[int, Option("--prompt", "-p", metavar="N", min=1, help="Number of prompt tokens.")] = 512,
    generate: Annotated[int, Option("--generate", "-n", metavar="N", min=1, help="Number of tokens to decode.")] = 128,
    batch: Annotated[
        int, Option("--batch", "-b", metavar="N", min=1, max=256, help="Number of concurrent sequences.")
    ] = 1,
    depth: Annotated[
        int, Option("--depth", "-d", metavar="N", min=0, help="Number of tokens in KV memory when decode begins.")
    ] = 0,
    repeats: Annotated[
        int, Option("--repeats", "-r", metavar="N", min=1, max=100, help="Number of runs; medians are shown.")
    ] = 5,
    workers: Workers = 1,
    kv_type: KvTypeOption = None,
    device: Annotated[
        list[str],
        Option("--device", metavar="DEVICE", help="cpu (default), or a GPU such as cuda:0 that holds all layers."),
    ] = [],  # noqa: B006  typer reads the default
    as_json: Json = False,
) -> None:
    """Measure the speed of prefill and decode, and compare it with the limits of this machine."""
    from llamaclust.model.kv_type import KvType
    from llamaclust.tools.bench.bench import BenchTask

    kv, place = kv_type or KvType.F16, known_device(device, workers)
    task = BenchTask(model, threads, prompt, generate, batch, depth, repeats, workers, kv, place)
    print_bench(task, as_json)


_WIDE_COLUMNS = 400


def print_bench(task: BenchTask, as_json: bool) -> None:
    from llamaclust.cli.progress import step_bar
    from llamaclust.tools.bench.bench import run_bench
    from llamaclust.wire.rpc.grpc_options import tune_grpc
    from llamaclust.worker.devices.cores import physical_cores

    if task.workers > 1:
        tune_grpc()
    steps = count(1)
    with ends_workers_cleanly(task.workers), step_bar("loading", task.steps) as show:
        report = run_bench(task, lambda what: show(next(steps), what))
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        _print_table(_table(report))
    threads = task.threads_each * task.workers
    if threads > physical_cores():
        _note(f"{threads} threads shared {physical_cores()} cores: one thread per core is faster")
    load = report.other_load
    if load is not None and load.is_much and not as_json:
        _note(f"{load.text} meanwhile: the figures would be higher on an idle machine")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _print_table(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(highlight=False, width=_WIDE_COLUMNS, file=io.StringIO())
    with wide.capture() as captured:
        wide.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _table(report: BenchReport) -> Table:
    from rich.table import Table

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
