"""`bench`: how fast a model runs here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llamaclust.cli.help import PlainCommand
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.model.program import KvType

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Catalog name or path of a .gguf.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", min=1, max=1024, help="Threads of each worker; all cores by default."),
]
Workers = Annotated[
    int, typer.Option("--workers", min=1, max=64, metavar="K", help="Cut the model over that many local processes.")
]

KvTypeOption = Annotated[
    str | None, typer.Option("--kv-type", metavar="TYPE", help="Keys and values in memory: f16 (default) or q8_0.")
]


def known_kv_type(kv_type: str | None) -> KvType | None:
    """UsageError for a type that there is not."""
    from llamaclust.model.program import KvType

    if kv_type is not None and kv_type not in set(KvType):
        raise UsageError(f"--kv-type {kv_type}: give one of {', '.join(KvType)}")
    return None if kv_type is None else KvType(kv_type)


def known_device(devices: list[str], workers: int) -> str:
    """UsageError for what is no device, or several."""
    from llamaclust.cluster.config.values import parse_device

    try:
        known = parse_device(",".join(devices) or "cpu")
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error
    if "," in known or (known != "cpu" and workers > 1):
        raise UsageError("--device: one GPU in this process; for several of them, or of workers, start a cluster")
    return known


def bench(
    model: ModelArgument,
    threads: Threads = None,
    prompt: Annotated[
        int, typer.Option("--prompt", "-p", metavar="N", min=1, help="Prompt tokens of a prefill.")
    ] = 512,
    generate: Annotated[
        int, typer.Option("--generate", "-n", metavar="N", min=1, help="Tokens that are decoded.")
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", "-b", metavar="N", min=1, max=256, help="Sequences at a time.")] = 1,
    depth: Annotated[
        int, typer.Option("--depth", "-d", metavar="N", min=0, help="Tokens in memory before decode begins.")
    ] = 0,
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", metavar="N", min=1, max=100, help="Runs; medians are shown.")
    ] = 5,
    workers: Workers = 1,
    kv_type: KvTypeOption = None,
    device: Annotated[
        list[str],
        typer.Option("--device", metavar="DEVICE", help="cpu (default), or a GPU as cuda:0, with all layers on it."),
    ] = [],  # noqa: B006  typer reads the default
    as_json: Json = False,
) -> None:
    """Measure prefill and decode, beside what this machine could do at best."""
    from llamaclust.cli import measuring
    from llamaclust.model.program import KvType
    from llamaclust.tools.bench.bench import BenchTask
    from llamaclust.tools.hub.catalog import resolve_model

    known = known_kv_type(kv_type) or KvType.F16
    one = known_device(device, workers)
    task = BenchTask(resolve_model(model), threads, prompt, generate, batch, depth, repeats, workers, known, one)
    measuring.print_bench(task, as_json)


def register(app: typer.Typer) -> None:
    """Adds the command of this file."""
    app.command(cls=PlainCommand)(bench)
