"""The `status` command: shows running clusters, once or repeatedly."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llamaclust.cli import terminal
from llamaclust.cli.drafts import accepted_text
from llamaclust.cli.progress import own_address
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.planner.format import choice_lines, number_text, shares_text
from llamaclust.cluster.state.clusters import find_running
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.core.errors import ClusterStartingError, LlamaclustError, UsageError
from llamaclust.core.gpus import DeviceLayers, placed
from llamaclust.core.sizes import MIB

_END_S = 10.0
_EVERY_S = 1.0
_WIDE = 200
_STARTING = "starting"
_RECOVERIES = 4
_ASKED_AT_ONCE = 16
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Watched:
    """A running cluster, found on this machine or at an endpoint."""

    name: str
    api: ClusterApi
    folder: ClusterDir | None
    record: ClusterRecord | None  # None for a cluster at an endpoint.

    @classmethod
    def find(
        cls, name: str | None, endpoint: str | None, api_key_file: Path | None, ca_file: Path | None = None
    ) -> Watched:
        """Finds a cluster. Raises UsageError if it does not run on this machine or if options contradict each other."""
        if endpoint is None:
            if ca_file is not None:
                raise UsageError("--ca-file is for --endpoint; a local cluster's certificate is already known")
            folder, record = find_running(environment().state_dir, name)
            return cls(record.name, ClusterApi.of(record, api_key_file), folder, record)
        if name is not None:
            raise UsageError("--cluster and --endpoint cannot be combined: give one of them")
        api = ClusterApi(f"the cluster at {endpoint}", endpoint, api_key_file, ca_file)
        return cls(endpoint, api, None, None)

    @property
    def has_ended(self) -> bool:
        return self.folder is not None and self.folder.ends_within(_END_S)


def show_status(cluster: Watched, as_json: bool, watch: bool) -> None:
    """Prints a cluster's state once or, with `watch`, every second until Ctrl-C or the cluster's end."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # Lines in a file or a pipe are not wrapped.
        console = Console(highlight=False, markup=False, width=_WIDE)
    live = None
    if watch and console.is_terminal and not as_json:
        live = Live(console=console, auto_refresh=False, vertical_overflow="ellipsis")
    with cluster.api as api, live or nullcontext():
        while True:
            try:
                state = api.status()
            except ClusterStartingError as start:
                state = _starting(cluster.name, cluster.record, start)
            except LlamaclustError:
                if not watch or not cluster.has_ended:
                    raise
                break
            shown = terminal.printable_values(state)
            if live is not None:
                live.update(_view(shown), refresh=True)
            elif as_json or watch:
                print(json.dumps(state) if as_json else _line(shown), flush=True)
            else:
                console.print(_view(shown))
            if not watch:
                return
            time.sleep(_EVERY_S)
    print(f"{cluster.name} is stopped", file=sys.stderr)


def show_clusters(clusters: list[tuple[ClusterDir, ClusterRecord]], as_json: bool) -> None:
    """Prints a line for each cluster. If a cluster does not answer, its line has the error instead."""
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        states = [*pool.map(_state_or_error, (record for _, record in clusters))]
    if as_json:
        print(json.dumps({"clusters": states}))
        return
    for state in terminal.printable_values(states):
        if "error" in state:
            print(state["error"])
        elif state["state"] == _STARTING:
            print(_starting_line(state))
        else:
            print(f"{next(_head(state))}; {_requests_text(state)}, workers: {len(state['workers'])}")
    sys.stdout.flush()
    print("`--cluster NAME` shows more of one cluster; `llamaclust down --all` stops all clusters", file=sys.stderr)


def _state_or_error(record: ClusterRecord) -> State:
    try:
        with ClusterApi.of(record) as api:
            return api.status()
    except ClusterStartingError as start:
        return _starting(record.name, record, start)
    except LlamaclustError as error:
        return {"name": record.name, "api": record.api, "pid": record.pid, "error": str(error)}


def _starting(name: str, record: ClusterRecord | None, start: ClusterStartingError) -> State:
    known = {"api": name} if record is None else {"api": record.api, "pid": record.pid, "model": record.model}
    requests = {"running": 0, "waiting": 0}
    return {"name": name, "state": _STARTING, "reason": start.awaited, **known, "workers": [], "requests": requests}


def _starting_line(state: State) -> str:
    what = f", {state['model']} at {own_address(state['api'])} (pid {state['pid']})" if "pid" in state else ""
    return f"{state['name']}: {_STARTING}{what}{f'; it waits for {reason}' if (reason := state['reason']) else ''}"


def _line(state: State) -> str:
    if state["state"] == _STARTING:
        return f"{time.strftime('%H:%M:%S')} {_starting_line(state)}"
    requests, speed = state["requests"], state["speed"]["measured"]
    busy = ", ".join(
        f"{worker['name']} {worker['busy']:.0%}" for worker in state["workers"] if worker["layers"] is not None
    )
    parts = (
        f"{time.strftime('%H:%M:%S')} {state['name']}: {state['state']}",
        f"{requests['running']} running, {requests['waiting']} waiting",
        f"{speed['tokens_per_s']:.1f} tok/s",
        f"{number_text(speed['token_ms'])} ms/token (predicted {number_text(state['speed']['predicted']['token_ms'])})",
        f"busy {busy or '-'}",
        f"recoveries {state['recoveries']}",
    )
    return "; ".join(parts)


def _view(state: State) -> Group:
    if state["state"] == _STARTING:
        return Group(Text(_starting_line(state)))
    workers = state["workers"]
    groups = state.get("groups", ())  # Older coordinators report no groups.
    lines = (
        *version_lines(state),
        *_quarantine_lines(workers),
        *closed_port_lines(workers),
        *idle_lines(workers),
        *group_lines(groups),
        *gpu_lines(workers),
        *_kv_disk_lines(workers),
    )
    below = (Text(line) for line in lines)
    absent = (Text(f"absent: {', '.join(state['absent'])}") for _ in state["absent"][:1])
    return Group(*(Text(line) for line in _head(state)), _workers(workers), *below, *absent)


def _head(state: State) -> Iterator[str]:
    model, models = state["model"], state.get("models", ())
    is_ready = state["state"] == "asleep" and any(each["state"] == "ready" for each in models)
    place = f"{own_address(state['api'])} (pid {state['pid']})"
    yield f"{state['name']}: {'ready' if is_ready else state['state']}, {model} at {place}"
    if state["insecure"]:
        yield "INSECURE: links between machines are neither encrypted nor authenticated"
    if state["reason"] is not None:
        yield state["reason"]
    yield f"requests: {_requests_text(state)}"
    if len(models) > 1:
        yield f"models: {', '.join(map(_model, models))}"
    predicted, measured = state["speed"]["predicted"], state["speed"]["measured"]
    if measured["requests"]:
        yield f"measured:  {_speed(measured)} in the last 10 s"
    for head, line in zip(("drafts:", ""), _drafts(measured), strict=False):
        yield f"{head:<10} {line}"
    if predicted["prompt_tokens"] is not None:  # The model has had a plan.
        bottleneck = f", bottleneck: {predicted['bottleneck']}" if predicted["bottleneck"] else ""
        yield f"predicted: {_speed(predicted)} for many requests{bottleneck}"
    if choice := state.get("choice"):  # Older coordinators report no choice of plans.
        yield from choice_lines(choice)
    if state["recoveries"]:
        last = ", ".join(f"{seconds:.2f}" for seconds in state["recovery_seconds"][-_RECOVERIES:])
        yield f"recoveries: {state['recoveries']}; the last took {last} s"


def _requests_text(state: State) -> str:
    requests = [each["requests"] for each in state.get("models", ())] or [state["requests"]]
    running, waiting = (sum(counts[what] for counts in requests) for what in ("running", "waiting"))
    return f"{running} running, {waiting} waiting"


def _model(model: State) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in model["requests"].items() if count)
    return f"{model['name']} {model['state']}{f' ({counts})' if counts else ''}"


def _quarantine_lines(workers: list[dict[str, Any]]) -> Iterator[str]:
    for worker in workers:
        if quarantine := worker.get("quarantine"):
            pause = f"is quarantined for {quarantine['left_s']:.0f} s unless the model needs it"
            reason = quarantine["reason"]
            yield f"{worker['name']}: {pause}: it failed {quarantine['failures']} times, last: {reason}"


def version_lines(state: State) -> Iterator[str]:
    """Yields the versions of the coordinator and its workers, if they differ."""
    of = {"coordinator": state["version"], **{worker["name"]: worker["version"] for worker in state["workers"]}}
    if len({*of.values()}) > 1:
        versions = ", ".join(f"{name} {version}" for name, version in of.items())
        yield f"versions of llamaclust differ: {versions}; finish the upgrade, one machine after the other"


def idle_lines(workers: list[dict[str, Any]]) -> Iterator[str]:
    for worker in workers:
        if reason := worker.get("idle_reason"):  # Older coordinators report none.
            yield f"{worker['name']}: not used: {reason}"


def closed_port_lines(workers: list[dict[str, Any]]) -> Iterator[str]:
    for worker in workers:
        if why := worker.get("closed_port"):
            yield f"{worker['name']}: in no group of an automatic plan: {why}"


def group_lines(groups: Iterable[dict[str, Any]]) -> Iterator[str]:
    for group in groups:
        shares = shares_text([member["share"] for member in group["members"]])
        layers, time = "[{}, {})".format(*group["layers"]), number_text(group["gathers_ms"])
        gathers = f"{time} ms/token in gathers (predicted {number_text(group['predicted_gathers_ms'])})"
        slowest = group["waits_most_for"]
        waits = f", slowest member {slowest}" if slowest else ""
        yield f"{group_name(group)}: layers {layers} in shares {shares}, {gathers}{waits}"


def group_name(group: dict[str, Any]) -> str:
    """Joins the names of a group's members, leader first, as in a+b."""
    return "+".join(member["worker"] for member in group["members"])


def gpu_lines(workers: list[dict[str, Any]]) -> Iterator[str]:
    for worker in workers:
        if worker.get("gpus") and worker["layers"] is not None:
            held = [_device_layers(part) for part in worker["device_layers"]]
            yield f"{worker['name']}: {placed(held)}"
        for gpu in worker.get("gpus", ()):
            name = gpu["name"]
            taken = (gpu["total_bytes"] - gpu["free_bytes"]) / MIB
            unused = f"; unused: {gpu['unused']}" if gpu.get("unused") else ""
            total = gpu["total_bytes"] / MIB
            yield f"{worker['name']}: {gpu['device']} {name}, {taken:.0f} of {total:.0f} MiB taken{unused}"


def _device_layers(part: dict[str, Any]) -> DeviceLayers:
    start, end = part["layers"]
    return DeviceLayers(part["device"], start, end, tuple(part["cpu_moe"]))


def _kv_disk_lines(workers: list[dict[str, Any]]) -> Iterator[str]:
    for worker in workers:
        heartbeat = worker["heartbeat"]
        if worker.get("kv_disk_bytes") and heartbeat is not None:
            used, written, read = (heartbeat[f"kv_disk_{what}_bytes"] / MIB for what in ("used", "written", "read"))
            most = worker["kv_disk_bytes"] / MIB
            yield f"{worker['name']}: KV on disk: {used:.0f} of {most:.0f} MiB; {written:.0f} written, {read:.0f} read"


def _speed(speed: dict[str, Any]) -> str:
    first = f"first token of a {speed['prompt_tokens']}-token prompt after {number_text(speed['ttft_ms'])} ms"
    return f"{number_text(speed['token_ms'])} ms/token, {first}, {number_text(speed['tokens_per_s'])} tok/s"


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("worker", no_wrap=True, overflow="fold")  # Users copy the names of workers.
    for title in ("pid", "version", "device", "layers", "state"):
        table.add_column(title, overflow="fold")
    for title in ("MiB now", "planned", "busy", "tok/s", "ms/token", "predicted"):
        table.add_column(title, justify="right", overflow="fold")
    for worker in workers:
        layers = "-" if worker["layers"] is None else "[{}, {})".format(*worker["layers"])
        if share := worker.get("share"):
            layers += f" {share:.0%}"
        heartbeat = worker["heartbeat"]
        now = "?" if heartbeat is None else f"{heartbeat['resident_bytes'] / MIB:.0f}"
        memory = now, f"{worker['memory_bytes'] / MIB:.0f}"
        figures = (*memory, f"{worker['busy']:.0%}", f"{worker['tokens_per_s']:.1f}")
        times = (number_text(worker["decode_ms"]), number_text(worker["predicted_decode_ms"]))
        marks = [mark for mark, is_set in _marks(worker) if is_set]
        what = ", ".join((worker["state"], *marks))
        table.add_row(
            worker["name"],
            str(worker["pid"]),
            worker.get("version", "?"),
            worker["device"],
            layers,
            what,
            *figures,
            *times,
        )
    return table


def _marks(worker: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    return ("drained", worker["drained"]), ("quarantined", worker.get("quarantine") is not None)


def _drafts(measured: dict[str, Any]) -> Iterator[str]:
    if drafted := measured.get("drafted_tokens"):
        yield f"{accepted_text(measured['accepted_tokens'], drafted)} in the last 10 s"
    if drafts := measured.get("drafts"):
        kinds = (f"{kind} {each['accepted_tokens']} of {each['drafted_tokens']}" for kind, each in drafts.items())
        yield f"since the start: {', '.join(kinds)}"
