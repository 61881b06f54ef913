"""The commands `up`, `down`, `status`, `plan`, `drain`, `undrain` and `logs`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from typer import Argument, Option

from llamaclust.cli import terminal
from llamaclust.cli.cluster_source import cluster_source, mmproj_override
from llamaclust.cli.interrupts import ends_at_once
from llamaclust.cli.options import (
    CaFile,
    Cluster,
    Endpoint,
    Json,
    KeyFile,
    LocalWorkers,
    Mmproj,
    Overrides,
    Source,
    option_value,
)
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.regular_file import open_regular

if TYPE_CHECKING:
    from llamaclust.cluster.client.operations import ClusterApi
    from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord

Worker = Annotated[str, Argument(metavar="WORKER", help="Name of a worker.")]

_KILL_S = 10.0
_STOP_S = 60.0
_IDLE_S = 1.5
_FILE_S, _TAIL_S = 0.05, 0.5
"""Seconds between two reads of a followed log: _FILE_S for a file on this machine, _TAIL_S for a log read by HTTP."""
_PIECE = 1 << 16
_COORDINATOR = "coordinator"


def up(
    source: Source = None,
    overrides: Overrides = [],  # noqa: B006  typer reads the default
    workers: LocalWorkers = None,
    port: Annotated[
        int | None, Option(min=0, max=65535, metavar="N", help="Port of the HTTP API; 0 for any free port.")
    ] = None,
    lan: Annotated[
        bool,
        Option("--lan", help="Serve phones and computers on the local network, too. They need the printed API key."),
    ] = False,
    chat_template: Annotated[
        str | None,
        Option(
            "--chat-template",
            metavar="NAME",
            help="Built-in chat template or Jinja file to use instead of the model's template.",
        ),
    ] = None,
    mmproj: Mmproj = None,
    discover: Annotated[
        bool, Option("--discover", help="Let workers on the local network find the cluster by multicast DNS.")
    ] = False,
    detach: Annotated[
        bool, Option("--detach", "-d", help="Return when the cluster is ready, and leave it running.")
    ] = False,
    standby: Annotated[
        bool, Option("--standby", help="Run a standby, which takes over if the running coordinator ends unexpectedly.")
    ] = False,
    notify: Annotated[int | None, Option("--notify", hidden=True)] = None,
    ranked: Annotated[bool, Option("--ranked", hidden=True)] = False,
) -> None:
    """Start a cluster and serve its API until Ctrl-C. FILE describes the cluster, or is a model for local workers."""
    with ends_at_once():
        from llamaclust.cli.up import run_cluster, template_of

    file, overrides = cluster_source(source, workers, overrides, discover=discover)
    if chat_template is not None:
        overrides = [*overrides, f"chat_template={template_of(chat_template)}"]
    overrides = [*overrides, *mmproj_override(mmproj)]
    run_cluster(file, overrides, port, lan=lan, detach=detach, standby=standby, notify=notify, ranked=ranked)


def down(
    cluster: Cluster = None,
    every: Annotated[bool, Option("--all", help="Stop all clusters that run on this machine.")] = False,
) -> None:
    """Stop a running cluster. Running requests get up to 30 seconds to finish. A second `down` does not wait."""
    if every and cluster is not None:
        raise UsageError("--all and --cluster cannot be combined: give one of them")
    clusters = _all_running() if every else [_running(cluster)]
    failures: list[LlamaclustError] = []
    for step in (_signal_end, _await_end):  # All clusters get the signal before the command waits for any of them.
        for each in [*clusters]:
            try:
                step(*each)
            except LlamaclustError as error:
                failures.append(error)
                clusters.remove(each)
    if failures:
        raise LlamaclustError("; ".join(map(str, failures)))


def _signal_end(_: ClusterDir, record: ClusterRecord) -> None:
    record.signal(signal.SIGTERM)


def _await_end(folder: ClusterDir, record: ClusterRecord) -> None:
    from llamaclust.cluster.state.journal_records import left_unanswered

    if not folder.ends_within(_IDLE_S):
        what = "running requests are finished first; `llamaclust down` again stops at once"
        print(f"{record.name}: {what}", file=sys.stderr)
    if not folder.ends_within(_STOP_S):
        print(f"{record.name} has not ended within {_STOP_S:.0f} s: it is killed now", file=sys.stderr)
        folder.mark_stopped()  # This keeps a standby from taking over.
        folder.forget_record()
        record.signal(signal.SIGKILL)
        if not folder.ends_within(_KILL_S):
            folder.write_record(record)
            raise LlamaclustError(f"cluster {record.name} (pid {record.pid}) does not end; inspect it with `ps`")
    if left := left_unanswered(folder.journal):
        print(f"{record.name}: {left}", file=sys.stderr)
    print(f"{record.name} is stopped", file=sys.stderr)


def status(
    cluster: Cluster = None,
    every: Annotated[bool, Option("--all", help="Show one line for each cluster on this machine.")] = False,
    as_json: Json = False,
    watch: Annotated[bool, Option("--watch", "-w", help="Repeat every second until Ctrl-C.")] = False,
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    ca_file: CaFile = None,
) -> None:
    """Show a running cluster: workers, layers, memory, requests, measured and predicted speed. If several clusters run,
    show one line for each."""
    from llamaclust.cli.status import Watched, show_clusters, show_status

    one = cluster or endpoint or api_key_file or ca_file or watch
    if every and one:
        raise UsageError("--all shows all clusters once: remove all other options except --json")
    if every or not (one or as_json):
        several = _all_running()
        if every or len(several) > 1:
            show_clusters(several, as_json)
            return
    show_status(Watched.find(cluster, endpoint, api_key_file, ca_file), as_json, watch)


def drain(worker: Worker, cluster: Cluster = None) -> None:
    """Move a worker's layers to other workers without losing a token. The worker gets no layers until `undrain`."""
    with _api(_running(cluster)[1]) as api:
        api.drain(_worker_name(worker))
    print(f"worker {worker} is drained: it holds no layers, and gets none until `undrain`", file=sys.stderr)


def undrain(worker: Worker, cluster: Cluster = None) -> None:
    """Make a drained worker available again."""
    with _api(_running(cluster)[1]) as api:
        api.undrain(_worker_name(worker))
    print(f"worker {worker} is used again: it gets layers when that makes the cluster faster", file=sys.stderr)


def logs(
    worker: Annotated[
        str, Argument(metavar="WORKER", help="Name of a worker, or `coordinator` for a detached cluster's coordinator.")
    ],
    follow: Annotated[bool, Option("-f", "--follow", help="Keep printing new lines until Ctrl-C.")] = False,
    cluster: Cluster = None,
) -> None:
    """Print the log of a worker. Use --cluster for a cluster that has ended."""
    folder, record = _running_or_last(cluster)
    if record is not None and not record.is_local and worker != _COORDINATOR:
        _print_tail(record, _worker_name(worker), follow)
        return
    files = {path.stem: path for path in sorted(folder.logs.glob("*.log"))}
    if worker not in files:
        what = f"of a worker named {worker!r}"
        if worker == _COORDINATOR:
            what = "of the coordinator, which logs to its terminal unless `up --detach` started it"
        elif record is None:
            what += f": {folder.path.name} has ended, and workers on other machines keep their logs there"
        raise UsageError(f"no log {what}; there are logs of: {', '.join(files) or 'none'}")
    with _opened(files[worker]) as file:
        _print_rest(file)
        while follow:
            time.sleep(_FILE_S)
            # A log that became shorter was emptied, because it had become too large.
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)
            _print_rest(file)


def _opened(log: Path) -> TextIO:
    try:
        return TextIOWrapper(open_regular(log), "utf-8", "replace")
    except OSError as error:
        raise UsageError(f"{log}: cannot be read: {error.strerror}; remove it") from error


def _print_rest(file: TextIO) -> None:
    """Prints the rest of a log in pieces, since it may be larger than memory."""
    while piece := file.read(_PIECE):
        terminal.write(piece)


def _print_tail(record: ClusterRecord, worker: str, follow: bool) -> None:
    """Prints the last lines of a worker's log and, if `follow` is True, new lines."""
    printed = 0
    with _api(record) as api:
        while True:
            before, lines = api.log(worker)
            # A log that became shorter belongs to a restarted worker, and is printed from its first line.
            printed = printed if printed <= before + len(lines) else 0
            terminal.write("".join(f"{line}\n" for line in lines[max(0, printed - before) :]))
            printed = before + len(lines)
            if not follow:
                return
            time.sleep(_TAIL_S)


def plan(
    source: Source = None,
    overrides: Overrides = [],  # noqa: B006  typer reads the default
    workers: LocalWorkers = None,
    mmproj: Mmproj = None,
    as_json: Json = False,
    assume: Annotated[
        str | None,
        Option(
            "--assume",
            metavar="MACHINES",
            help="Plan for hypothetical machines, e.g. '3x16GB' or '3x16GB@40GB/s,1Gbit'.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option("--model", metavar="MODEL", help="Model for --assume: a size like 8b, a catalog name or a model file."),
    ] = None,
    acceptance: Annotated[
        list[str],
        Option(
            "--acceptance",
            metavar="SHARE",
            help="Predict speeds for this acceptance rate of draft tokens, e.g. 0.8 or 80%; repeatable.",
        ),
    ] = [],  # noqa: B006  typer reads the default
) -> None:
    """Show how the model would be split, with memory and predicted speed, without starting anything."""
    acceptances = _acceptances(acceptance)
    if assume is not None or model is not None:
        from llamaclust.cli.plans.assumed_plan import show_assumed_plan

        if source is not None or workers is not None or mmproj is not None:
            raise UsageError("--assume describes the machines: remove FILE, --workers and --mmproj")
        show_assumed_plan(assume, model, overrides, as_json, acceptances)
        return
    from llamaclust.cli.plans.plan import show_plan

    file, overrides = cluster_source(source, workers, overrides)
    show_plan(file, [*overrides, *mmproj_override(mmproj)], as_json, acceptances)


def _acceptances(given: Sequence[str]) -> tuple[float, ...] | None:
    return tuple(map(_share, given)) or None


def _share(given: str) -> float:
    number = given.removesuffix("%")
    try:
        share = float(number) / (100.0 if number != given else 1.0)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"--acceptance: {given} is not an acceptance rate; give 0 to 1, for example 0.8 or 80%")
    return share


def _running(name: str | None) -> tuple[ClusterDir, ClusterRecord]:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.state.clusters import find_running

    return find_running(environment().state_dir, name)


def _all_running() -> list[tuple[ClusterDir, ClusterRecord]]:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.state.clusters import running_clusters

    return [*running_clusters(environment().state_dir).values()] or [_running(None)]


def _running_or_last(name: str | None) -> tuple[ClusterDir, ClusterRecord | None]:
    """Returns a cluster's folder and, if the cluster runs, its record. Without a name, finds only running clusters."""
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.state.clusters import running_clusters
    from llamaclust.cluster.state.directory import ClusterDir

    state_dir = environment().state_dir
    if name in {path.name for path in state_dir.glob("*/")} - running_clusters(state_dir).keys():
        return ClusterDir(state_dir / name), None
    return _running(name)


def _api(record: ClusterRecord) -> ClusterApi:
    from llamaclust.cluster.client.operations import ClusterApi

    return ClusterApi.of(record)


def _worker_name(worker: str) -> str:
    from llamaclust.cluster.config.values import parse_name

    return option_value("WORKER", parse_name, worker)
