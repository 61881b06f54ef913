"""The `measure` command, which repeats the stored measurements of this machine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llamaclust.cli.cluster_source import cluster_source
from llamaclust.cli.interrupts import ends_at_once, signals_as_interrupts
from llamaclust.cli.options import Json, LocalWorkers, Overrides, Source
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import LlamaclustError, UsageError

if TYPE_CHECKING:
    from llamaclust.cluster.config.cluster_config import ClusterConfig
    from llamaclust.cluster.server.measurement import Figure, MeasuredModel, MeasuredPart, Measurements


def measure(
    source: Source = None,
    overrides: Overrides = [],  # noqa: B006  typer reads the default
    workers: LocalWorkers = None,
    as_json: Json = False,
) -> None:
    """Measure this machine again, with the model of FILE, for later plans. Stop the cluster of FILE first. Other
    programs should be idle."""
    from llamaclust.cluster.config.cluster_config import load_config

    config = load_config(*cluster_source(source, workers, overrides))
    if not config.launcher_facts.is_local:
        where = f"delete .profiles.json and .links.json in {config.state_dir}, and the next `up` measures again"
        raise UsageError(f"launcher {config.launcher}: `measure` starts workers on this machine only; {where}")
    found = _measured(config)
    print(json.dumps(_json(found)) if as_json else "\n".join(_lines(found)))
    stated = {worker.name for worker in config.workers if worker.memory_bandwidth_gb_s is not None}
    if failed := {name for each in found.models for name in each.missing} - stated:
        raise LlamaclustError(f"not measured: {', '.join(sorted(failed))}; earlier measurements are kept")


def _measured(config: ClusterConfig) -> Measurements:
    import asyncio

    from llamaclust.cli.progress import cluster_view
    from llamaclust.cluster.config.catalog import resolve_model
    from llamaclust.cluster.state.directory import ClusterDir
    from llamaclust.wire.rpc.grpc_options import tune_grpc

    paths = [resolve_model(own.model) for own in config.of_each_model()]
    tune_grpc()
    with ends_at_once():
        from llamaclust.cluster.server.measurement import measure_workers

    folder = ClusterDir(config.state_dir / config.name)
    with signals_as_interrupts(signal.SIGTERM, signal.SIGHUP), cluster_view(config.name) as show, folder.locked():
        return asyncio.run(measure_workers(config, paths, folder, show))


def _json(found: Measurements) -> dict[str, Any]:
    models = [
        {
            "name": each.name,
            "devices": _parts_json(each.devices),
            "not_measured": each.missing,
            "other_loads": {name: asdict(load) for name, load in each.other_loads.items()},
        }
        for each in found.models
    ]
    return {"models": models, "links": _parts_json(found.links)}


def _parts_json(parts: Sequence[MeasuredPart]) -> list[dict[str, Any]]:
    return [
        {"name": part.name, "figures": [asdict(figure) | {"ratio": figure.ratio} for figure in part.figures]}
        for part in parts
    ]


def _lines(found: Measurements) -> Iterator[str]:
    for model in found.models:
        yield f"{printable(model.name)}:"
        yield from _part_lines(model)
    yield from _table(found.links, "link ")


def _part_lines(model: MeasuredModel) -> Iterator[str]:
    yield from _table(model.devices, "worker ")
    yield from (f"  worker {name}: not measured, or the cluster file states its speeds" for name in model.missing)


def _table(parts: Sequence[MeasuredPart], kind: str) -> Iterator[str]:
    rows = [(f"  {kind}{part.name}: {figure.name}", figure) for part in parts for figure in part.figures]
    width = max((len(label) for label, _ in rows), default=0)
    yield from (f"{label:<{width}}  {_text(figure)}" for label, figure in rows)


def _text(figure: Figure) -> str:
    measured = f"{figure.measured:9.3f} {figure.unit:<6}"
    if figure.stored is None or figure.ratio is None:
        return f"{measured}  nothing was stored"
    return f"{measured}  stored {figure.stored:9.3f}, ratio {figure.ratio:.2f}"
