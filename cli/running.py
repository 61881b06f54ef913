"""Commands about a cluster that runs: what it does, its logs, its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from llamaclust.cli import terminal
from llamaclust.cluster.api.settings import first_key
from llamaclust.cluster.config import environment
from llamaclust.cluster.state import ClusterDir, ClusterRecord, find_running, running_clusters
from llamaclust.errors import LlamaclustError, UsageError
from llamaclust.sizes import MIB

_ANSWER_S = 10.0
_DRAIN_S = 60.0
_POLL_S = 0.05
_SILENCE_S = 1.5


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


def show(name: str | None, as_json: bool) -> None:
    """Prints what the cluster says of itself."""
    _, record = find_running(environment().state_dir, name)
    state = fetch_status(record)
    if as_json:
        print(json.dumps(state))
    else:
        _print_table(state)


def fetch_status(record: ClusterRecord) -> dict[str, Any]:
    """The `status` part of GET /cluster."""
    headers = {}
    if record.api_keys_file is not None:
        headers["Authorization"] = f"Bearer {first_key(Path(record.api_keys_file))}"
    try:
        with httpx.Client(timeout=_ANSWER_S, trust_env=False) as client:
            answer = client.get(f"{record.api}/cluster", headers=headers)
    except httpx.HTTPError as error:
        raise LlamaclustError(f"cluster {record.name} at {record.api} does not answer: {error}") from error
    if answer.status_code != httpx.codes.OK:
        raise LlamaclustError(f"cluster {record.name} at {record.api}: {answer.text.strip()}")
    state: dict[str, Any] = answer.json()["status"]
    return state


def _print_table(state: dict[str, Any]) -> None:
    requests = state["requests"]
    model = terminal.printable(state["model"])
    print(f"{state['name']}: {state['state']}, {model} at {state['api']} (pid {state['pid']})")
    if state["insecure"]:
        print("INSECURE: links between machines are neither encrypted nor authenticated")
    if state["reason"] is not None:
        print(terminal.printable(state["reason"]))
    print(f"requests: {requests['running']} running, {requests['waiting']} waiting")
    table = Table(box=None, pad_edge=False)
    for title in ("worker", "pid", "device", "layers", "state"):
        table.add_column(title)
    for title in ("MiB", "busy", "tok/s"):
        table.add_column(title, justify="right")
    for worker in state["workers"]:
        layers = "-" if worker["layers"] is None else "[{}, {})".format(*worker["layers"])
        figures = (f"{worker['memory_bytes'] / MIB:.0f}", f"{worker['busy']:.0%}", f"{worker['tokens_per_s']:.1f}")
        what = f"{worker['state']}, spared" if worker["spared"] else worker["state"]
        table.add_row(worker["name"], str(worker["pid"]), worker["device"], layers, what, *figures)
    Console(highlight=False).print(table)


def print_log(name: str | None, worker: str, follow: bool) -> None:
    """Prints a worker's log, of a cluster that runs or of the one that ran last under that name."""
    logs = {log.stem: log for log in sorted(_log_folder(name).logs.glob("*.log"))}
    if worker not in logs:
        raise UsageError(f"no log of a worker named {worker!r}; there are logs of: {', '.join(logs) or 'none'}")
    with logs[worker].open(errors="replace") as file:
        terminal.write(file.read())
        while follow:
            time.sleep(_POLL_S)
            terminal.write(file.read())


def _log_folder(name: str | None) -> ClusterDir:
    state_dir = environment().state_dir
    if name in {path.name for path in state_dir.glob("*/")} - running_clusters(state_dir).keys():
        return ClusterDir(state_dir / name)
    return find_running(state_dir, name)[0]
