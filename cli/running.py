"""Commands about a cluster that runs: what it does, who works for it, its logs, its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from llamaclust.cli import status_view, terminal
from llamaclust.cli.cluster_api import ClusterApi
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.values import parse_name
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord, find_running, running_clusters
from llamaclust.core.errors import LlamaclustError, UsageError

_ANSWER_S = 10.0
_DRAIN_S = 60.0
_POLL_S = 0.05
_SILENCE_S = 1.5
_LOOK_S = 0.5
_COORDINATOR = "coordinator"


def stop(name: str | None) -> None:
    """Ends a cluster and waits until it is gone; running requests have a minute to finish."""
    folder, record = find_running(environment().state_dir, name)
    os.kill(record.pid, signal.SIGTERM)
    if not _gone_within(folder, _SILENCE_S):
        print("running requests are finished first; `llamaclust down` again stops at once", file=sys.stderr)
    if not _gone_within(folder, _DRAIN_S):
        print(f"{record.name} still answers requests after {_DRAIN_S:.0f} s: ending it now", file=sys.stderr)
        os.kill(record.pid, signal.SIGKILL)
        if not _gone_within(folder, _ANSWER_S):
            raise LlamaclustError(f"cluster {record.name} (pid {record.pid}) does not end; look at it with `ps`")
        folder.remove_record()
    print(f"{record.name} is stopped", file=sys.stderr)


def _gone_within(folder: ClusterDir, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while folder.is_running:
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def show(name: str | None, as_json: bool, watch: bool) -> None:
    """Prints what the cluster says of itself, once or until Ctrl-C or the cluster's end."""
    folder, record = find_running(environment().state_dir, name)
    with ClusterApi(record) as api:
        if watch:
            _watch(folder, record, api, as_json)
        elif as_json:
            print(json.dumps(api.status()))
        else:
            status_view.show(api.status())


def _watch(folder: ClusterDir, record: ClusterRecord, api: ClusterApi, as_json: bool) -> None:
    with status_view.watching(as_json) as show_next:
        while True:
            try:
                state = api.status()
            except LlamaclustError:
                if not _gone_within(folder, _ANSWER_S):
                    raise
                break
            show_next(state)
    print(f"{record.name} is stopped", file=sys.stderr)


def drain(name: str | None, worker: str) -> None:
    """Has a worker's layers moved to others; returns when it holds none."""
    _, record = find_running(environment().state_dir, name)
    with ClusterApi(record) as api:
        api.drain(_checked(worker))
    print(f"worker {worker} is drained: it holds no layers, and gets none until `undrain`", file=sys.stderr)


def undrain(name: str | None, worker: str) -> None:
    """Lets a worker have layers again."""
    _, record = find_running(environment().state_dir, name)
    with ClusterApi(record) as api:
        api.undrain(_checked(worker))
    print(f"worker {worker} is used again: it gets layers where that makes the cluster faster", file=sys.stderr)


def _checked(worker: str) -> str:
    try:
        return parse_name(worker)
    except ValueError as error:
        raise UsageError(f"WORKER: {error}") from error


def print_log(name: str | None, worker: str, follow: bool) -> None:
    """Prints a worker's log, of a cluster that runs or of the one that ran last under that name: the whole file where
    that is on this machine, else the last lines, as the worker tells them."""
    folder, record = _cluster(name)
    if record is not None and record.launcher != "local" and worker != _COORDINATOR:
        _print_told(record, _checked(worker), follow)
        return
    logs = {log.stem: log for log in sorted(folder.logs.glob("*.log"))}
    if worker not in logs:
        raise UsageError(f"no log of a worker named {worker!r}; there are logs of: {', '.join(logs) or 'none'}")
    with logs[worker].open(errors="replace") as file:
        terminal.write(file.read())
        while follow:
            time.sleep(_POLL_S)
            terminal.write(file.read())


def _print_told(record: ClusterRecord, worker: str, follow: bool) -> None:
    """By numbers of lines: those that were printed are not printed again, those of another process are."""
    printed = 0
    with ClusterApi(record) as api:
        while True:
            before, lines = api.log(worker)
            printed = printed if printed <= before + len(lines) else 0
            terminal.write("".join(f"{line}\n" for line in lines[max(0, printed - before) :]))
            printed = before + len(lines)
            if not follow:
                return
            time.sleep(_LOOK_S)


def _cluster(name: str | None) -> tuple[ClusterDir, ClusterRecord | None]:
    """One that runs, with its record, or one that does not."""
    state_dir = environment().state_dir
    if name in {path.name for path in state_dir.glob("*/")} - running_clusters(state_dir).keys():
        return ClusterDir(state_dir / name), None
    return find_running(state_dir, name)
