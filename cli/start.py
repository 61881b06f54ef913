"""`up`: in front, or as a process of its own that tells this one how its start goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from llamaclust.cli.detach import Starter, run_detached  # noqa: E402
from llamaclust.cli.interrupts import ends_at_once  # noqa: E402
from llamaclust.cli.progress import shown_progress  # noqa: E402
from llamaclust.cli.watch import cluster_view  # noqa: E402
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config  # noqa: E402
from llamaclust.cluster.state.events import Event, StartFailed  # noqa: E402
from llamaclust.core.errors import LlamaclustError, UsageError  # noqa: E402

if TYPE_CHECKING:
    from llamaclust.tools.hub.download import Progress


def up(
    file: Path | None, overrides: list[str], port: int | None, *, detach: bool, notify: int | None, ranked: bool
) -> None:
    """Runs a cluster to its end, or returns when a detached one is ready."""
    if port is not None:
        overrides = [*overrides, f"listen={load_config(file, overrides).host}:{port}"]
    config = load_config(file, overrides)
    if notify is not None:
        _run_notifying(config, Starter(notify))
        return
    if config.launcher == "mpi" and not ranked:
        _run_as_rank(config, _arguments(file, overrides), detach=detach)
    with shown_progress() as progress:
        model = pull(config, progress)
    if detach:
        run_detached(config, _arguments(file, overrides))
        return
    with ends_at_once(), cluster_view(config.name) as view:  # until the cluster handles signals itself
        from llamaclust.cluster.server.serve import serve

        serve(config, model, view.show)


def template_of(choice: str) -> str:
    """As the cluster file has it: a name, or a path that is the same from any folder. UsageError for neither."""
    from llamaclust.model.chat.template_choice import built_in_names, chosen_template

    chosen_template(choice)
    return choice if choice in built_in_names() else str(Path(choice).expanduser().absolute())


def _run_as_rank(config: ClusterConfig, arguments: list[str], *, detach: bool) -> NoReturn:
    from llamaclust.cluster.launchers.mpi_rank import run_ranks

    if detach:
        raise UsageError("--detach: a cluster of launcher mpi lives as long as mpirun; put that into the background")
    raise SystemExit(run_ranks(config, arguments))


def pull(config: ClusterConfig, progress: Progress) -> Path:
    """The model's file, downloaded first where it is a catalog's and not there yet."""
    from llamaclust.tools.hub.pull import pull_model

    return pull_model(config.model, progress)


def _arguments(file: Path | None, overrides: list[str]) -> list[str]:
    arguments = [str(file.absolute())] if file else []
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def _run_notifying(config: ClusterConfig, starter: Starter) -> None:
    """Serves as the detached process: events go to the one that waits, later ones to the log."""
    from llamaclust.cluster.server.serve import serve
    from llamaclust.tools.hub.pull import silent

    view = cluster_view(config.name)

    def watch(event: Event) -> None:
        (starter.tell if starter.waits else view.show)(event)

    try:
        serve(config, pull(config, silent), watch)
    except LlamaclustError as error:
        watch(StartFailed(str(error), error.exit_code))
        raise
