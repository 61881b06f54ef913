"""A running cluster: `status`, `down`, `drain`, `undrain`, `logs`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llamaclust.cli import terminal
from llamaclust.cluster.api.settings import first_key
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.values import parse_name
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord, find_running, running_clusters
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, UsageError
from llamaclust.core.gpus import DeviceLayers, placed
from llamaclust.core.sizes import MIB

_ANSWER_S = 10.0
_STOP_S = 60.0
_POLL_S = 0.05
_IDLE_S = 1.5
_LOOK_S = 0.5
_COORDINATOR = "coordinator"


def stop(name: str | None) -> None:
    """Ends a cluster and waits until it is gone; running requests have a minute to finish."""
    folder, record = find_running(environment().state_dir, name)
    os.kill(record.pid, signal.SIGTERM)
    if not _gone_within(folder, _IDLE_S):
        print("running requests are finished first; `llamaclust down` again stops at once", file=sys.stderr)
    if not _gone_within(folder, _STOP_S):
        print(f"{record.name} still answers requests after {_STOP_S:.0f} s: ending it now", file=sys.stderr)
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


def show_status(name: str | None, as_json: bool, watch: bool) -> None:
    """Prints what the cluster says of itself, once or until Ctrl-C or the cluster's end."""
    folder, record = find_running(environment().state_dir, name)
    with ClusterApi(record) as api:
        if watch:
            _watch(folder, record, api, as_json)
        elif as_json:
            print(json.dumps(api.status()))
        else:
            print_state(api.status())


def _watch(folder: ClusterDir, record: ClusterRecord, api: ClusterApi, as_json: bool) -> None:
    with watching(as_json) as show_next:
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


_DRAIN_S = 630.0
"""The coordinator gives up a little earlier, and says why."""
_KINDS: dict[int, type[LlamaclustError]] = {
    UsageError.http_status: UsageError,
    InsufficientMemoryError.http_status: InsufficientMemoryError,
}


class ClusterApi:
    """A context manager: holds a connection while it is entered. Errors name the cluster and its address."""

    def __init__(self, record: ClusterRecord) -> None:
        headers = {}
        if record.api_keys_file is not None:
            headers["Authorization"] = f"Bearer {first_key(Path(record.api_keys_file))}"
        self._where = f"cluster {record.name} at {record.api}"
        self._client = httpx.Client(base_url=record.api, headers=headers, timeout=_ANSWER_S, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def status(self) -> dict[str, Any]:
        """The `status` part of GET /cluster."""
        state: dict[str, Any] = self._request("GET", "/cluster")["status"]
        return state

    def drain(self, worker: str) -> None:
        """`worker` is a name that a worker may have. Returns when it holds no layers; InsufficientMemoryError or
        another error where it has to hold them."""
        self._request("POST", f"/cluster/workers/{worker}/drain", httpx.Timeout(_ANSWER_S, read=_DRAIN_S))

    def undrain(self, worker: str) -> None:
        self._request("POST", f"/cluster/workers/{worker}/undrain")

    def log(self, worker: str) -> tuple[int, list[str]]:
        """(how many lines its process wrote before, the last ones)."""
        told = self._request("GET", f"/cluster/workers/{worker}/log")
        return told["before"], told["lines"]

    def _request(self, method: str, path: str, timeout: httpx.Timeout | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, timeout=timeout or _ANSWER_S)
        except httpx.HTTPError as error:
            raise LlamaclustError(f"{self._where} does not answer: {error}") from error
        if answer.status_code == httpx.codes.OK:
            told: dict[str, Any] = answer.json()
            return told
        raise _KINDS.get(answer.status_code, LlamaclustError)(f"{self._where}: {_message(answer)}")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text.strip()


_EVERY_S = 1.0
_WIDE = 200
_RECOVERIES = 4
State = dict[str, Any]


def print_state(state: State) -> None:
    """The whole of it."""
    _console().print(_view(state))


@contextmanager
def watching(as_json: bool) -> Iterator[Callable[[State], None]]:
    """Shows one state after the other, a second each: cut to the height of a terminal, elsewhere a line each."""
    console = _console()
    if as_json or not console.is_terminal:
        line = json.dumps if as_json else state_line
        yield lambda state: _pause_after(lambda: print(line(state), flush=True))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        yield lambda state: _pause_after(lambda: live.update(_view(state), refresh=True))


def _pause_after(shown: Callable[[], None]) -> None:
    shown()
    time.sleep(_EVERY_S)


def _console() -> Console:
    """In a file or a pipe, lines are as long as they are."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_WIDE)


def state_line(state: State) -> str:
    """A cluster in one line."""
    requests, speed = state["requests"], state["speed"]["measured"]
    busy = ", ".join(f"{one['name']} {one['busy']:.0%}" for one in state["workers"] if one["layers"] is not None)
    parts = (
        f"{time.strftime('%H:%M:%S')} {state['name']}: {state['state']}",
        f"{requests['running']} running, {requests['waiting']} waiting",
        f"{speed['tokens_per_s']:.1f} tok/s",
        f"{number(speed['token_ms'])} ms/token (predicted {number(state['speed']['predicted']['token_ms'])})",
        f"busy {busy or '-'}",
        f"recoveries {state['recoveries']}",
    )
    return "; ".join(parts)


def _view(state: State) -> Group:
    gpus = (Text(line) for line in gpu_lines(state["workers"]))
    return Group(*(Text(line) for line in head_lines(state)), _workers(state["workers"]), *gpus)


def head_lines(state: State) -> Iterator[str]:
    """All but the workers."""
    model, requests = terminal.printable(state["model"]), state["requests"]
    yield f"{state['name']}: {state['state']}, {model} at {state['api']} (pid {state['pid']})"
    if state["insecure"]:
        yield "INSECURE: links between machines are neither encrypted nor authenticated"
    if state["reason"] is not None:
        yield terminal.printable(state["reason"])
    yield f"requests: {requests['running']} running, {requests['waiting']} waiting"
    predicted, measured = state["speed"]["predicted"], state["speed"]["measured"]
    if measured["requests"]:
        yield f"measured:  {_speed(measured)} in the last 10 s"
    bottleneck = f", bottleneck: {predicted['bottleneck']}" if predicted["bottleneck"] else ""
    yield f"predicted: {_speed(predicted)} for many requests{bottleneck}"
    if state["recoveries"]:
        last = ", ".join(f"{seconds:.2f}" for seconds in state["recovery_seconds"][-_RECOVERIES:])
        yield f"recoveries: {state['recoveries']}; the last took {last} s"


def gpu_lines(workers: list[dict[str, Any]]) -> Iterator[str]:
    """One for what of a worker's layers lies where, one for each GPU."""
    for worker in workers:
        if worker.get("gpus") and worker["layers"] is not None:
            held = [DeviceLayers(one["device"], *one["layers"]) for one in worker["device_layers"]]
            yield f"{worker['name']}: {placed(held)}"
        for gpu in worker.get("gpus", ()):
            name = terminal.printable(gpu["name"])
            taken = (gpu["total_bytes"] - gpu["free_bytes"]) / MIB
            yield f"{worker['name']}: {gpu['device']} {name}, {taken:.0f} of {gpu['total_bytes'] / MIB:.0f} MiB taken"


def _speed(speed: dict[str, Any]) -> str:
    first = f"first token of a {speed['prompt_tokens']}-token prompt after {number(speed['ttft_ms'])} ms"
    return f"{number(speed['token_ms'])} ms/token, {first}, {number(speed['tokens_per_s'])} tok/s"


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("worker", "pid", "device", "layers", "state"):
        table.add_column(title)
    for title in ("MiB", "busy", "tok/s", "ms/token", "predicted"):
        table.add_column(title, justify="right")
    for worker in workers:
        layers = "-" if worker["layers"] is None else "[{}, {})".format(*worker["layers"])
        figures = (f"{worker['memory_bytes'] / MIB:.0f}", f"{worker['busy']:.0%}", f"{worker['tokens_per_s']:.1f}")
        times = (number(worker["decode_ms"]), number(worker["predicted_decode_ms"]))
        what = f"{worker['state']}, drained" if worker["drained"] else worker["state"]
        table.add_row(worker["name"], str(worker["pid"]), worker["device"], layers, what, *figures, *times)
    return table


def number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
