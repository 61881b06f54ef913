"""What `status` shows: once, or again and again, in place on a terminal and as lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llamaclust.cli import terminal
from llamaclust.core.gpus import DeviceLayers, placed
from llamaclust.core.sizes import MIB

_EVERY_S = 1.0
_WIDE = 200
_RECOVERIES = 4

State = dict[str, Any]


def show(state: State) -> None:
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
    limiting = f", limited by {predicted['limiting']}" if predicted["limiting"] else ""
    yield f"predicted: {_speed(predicted)} for many requests{limiting}"
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
