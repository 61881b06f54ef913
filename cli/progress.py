"""Shows the progress of downloads, of a cluster's start and of other long work."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llamaclust.cli.terminal import printable
from llamaclust.cluster.config.catalog import WantedFile, find_entry, locate
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.state import events
from llamaclust.core.addresses import ANYWHERE, is_loopback, joined_address, split_address
from llamaclust.core.interfaces import reachable_host
from llamaclust.core.logs import LogFormat, count_file_shortages, start_logging
from llamaclust.core.sizes import MIB

if TYPE_CHECKING:
    from llamaclust.tools.progress import Progress as ShowProgress

_MOST_WAITING = 1000
_LAST_S = 2.0
_STEPS = 10
_LINE_S = 10.0
_JSON_LINE_S = 0.1


def announce(spec: str) -> None:
    """Prints a catalog model's description and licence on standard error, unless the model is already downloaded."""
    from llamaclust.tools.assume.assumed_model import with_file_size

    found = locate(spec)
    entry = find_entry(spec)
    if entry is None or not isinstance(found, WantedFile) or found.is_there:
        return
    size = with_file_size(entry).shown_size
    terms = f" (by using the model you accept it: {entry.terms})" if entry.terms else ""
    print(f"{entry.name}: {entry.summary}; {size}, from {entry.source}", file=sys.stderr)
    print(f"licence: {entry.licence}{terms}", file=sys.stderr)


@contextmanager
def shown_progress(counts_bytes: bool = True) -> Iterator[ShowProgress]:
    """Yields a function that shows progress on standard error: as a bar on a terminal, as lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(counts_bytes=counts_bytes)
        return
    done: list[ProgressColumn] = (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()] if counts_bytes else [MofNCompleteColumn()]
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *done, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done_bytes: int, total_bytes: int | None) -> None:
            if what not in tasks:
                for step in bar.tasks:
                    if step.total is None:  # A step of unknown size is over when another step begins.
                        bar.remove_task(tasks.pop(step.description))
                tasks[what] = bar.add_task(what, total=total_bytes)
            bar.update(tasks[what], completed=done_bytes, total=total_bytes)

        yield show


class ProgressLines:
    """Prints a line when a step begins, after each tenth of the step, and after ten seconds without a line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, counts_bytes: bool = True) -> None:
        self._clock = clock
        self._counts_bytes = counts_bytes
        self._shown: tuple[str, int] | None = None
        self._shown_at = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        step = (what, _STEPS * done_bytes // total_bytes if total_bytes else 0)
        now = self._clock()
        if step == self._shown and now - self._shown_at < _LINE_S:
            return
        self._shown, self._shown_at = step, now
        line = _line(what, done_bytes, total_bytes) if self._counts_bytes else f"{what}: {done_bytes} of {total_bytes}"
        print(line, file=sys.stderr)


class JsonLines:
    """Prints a JSON line when a step begins or ends, and at most ten lines a second in between."""

    def __init__(self) -> None:
        self._step = ""
        self._shown_at = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        now = time.monotonic()
        if what == self._step and done_bytes != total_bytes and now - self._shown_at < _JSON_LINE_S:
            return
        self._step, self._shown_at = what, now
        print(json.dumps({"step": what, "done_bytes": done_bytes, "total_bytes": total_bytes}), flush=True)


def _line(what: str, done_bytes: int, total_bytes: int | None) -> str:
    if total_bytes:
        return f"{what}: {done_bytes / MIB:.1f} of {total_bytes / MIB:.1f} MiB"
    return f"{what}: {done_bytes / MIB:.1f} MiB" if done_bytes else what


_log = logging.getLogger(__name__)
_UNNAMED = ("default", "demo")
"""Default names of clusters. Printed commands omit them."""


class ClusterView:
    """Shows a cluster's events on standard error, with bars on a terminal and lines elsewhere."""

    def __init__(self, lan_key: str | None = None) -> None:
        self._lan_key = lan_key
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._measuring = self._console.status("measuring")
        self._bars: dict[str, TaskID] = {}
        self._is_draining = False
        # The previous event if it was Measuring. Several models cause equal events, which are shown once.
        self._measured: events.Measuring | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._clear()

    def show(self, event: events.Event) -> None:
        """Shows an event. Ignores OSError, since a closed terminal must not end the cluster."""
        with suppress(OSError):
            self._show(event)

    def _show(self, event: events.Event) -> None:
        before, self._measured = self._measured, event if isinstance(event, events.Measuring) else None
        match event:
            case events.WorkerLoading():
                self._bar(f"worker {event.worker}, layers {event.start}-{event.end - 1}", "loading", event)
            case events.WorkerReading():
                self._bar(f"worker {event.worker} reads the model for others", "reading", event)
            case events.Measuring():
                if event != before:
                    self._measure(event)
            case events.StartFailed():
                self._clear()
            case events.PlanMade() | events.AwaitingWorkers():
                self._print("\n".join(event.lines))
            case events.WorkerJoined():
                self._print(joined_text(event))
            case events.Waiting():
                self._print(f"waiting for {printable(event.text)}")
            case events.Ready():
                self._print(ready_text(event, self._lan_key))
            case events.Notice():
                self._print(printable(event.text))
            case events.Draining():
                self._print(left_text(event) if self._is_draining else draining_text(event))
                self._is_draining = True

    def _print(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr)

    def _clear(self) -> None:
        self._measuring.stop()
        self._progress.stop()

    def _measure(self, event: events.Measuring) -> None:
        if self._console.is_terminal:
            self._measuring.update(f"measuring {', '.join(event.workers)}: {event.what}")
            self._measuring.start()
        else:
            print("\n".join(f"measuring worker {worker}: {event.what}" for worker in event.workers), file=sys.stderr)

    def _bar(self, label: str, doing: str, event: events.WorkerLoading | events.WorkerReading) -> None:
        bar = self._bars.get(label)
        if bar is None:
            if self._progress.disable:
                size = f"{event.total_bytes / MIB:.1f} MiB"
                has_begun = event.done_bytes < event.total_bytes  # False if the weights were cached or loaded quickly.
                print(f"{label}: {doing} {size}" if has_begun else f"{label}: {size} are loaded", file=sys.stderr)
            self._progress.start()
            bar = self._bars[label] = self._progress.add_task(label, total=event.total_bytes)
        self._progress.update(bar, completed=event.done_bytes, total=event.total_bytes)


def _log_event(event: events.Event) -> None:
    match event:
        case (
            events.WorkerLoading() | events.WorkerReading() | events.StartFailed()
        ):  # The command itself prints the error of a failed start.
            pass
        case events.Measuring():
            _log.info("workers measure %s: %s", event.what, ", ".join(event.workers))
        case events.PlanMade() | events.AwaitingWorkers():
            for line in event.lines:
                _log.info("%s", line.strip())
        case events.Ready():
            _log.info("%s is ready: %s at %s", event.name, event.model, own_address(event.api))
        case events.WorkerJoined():
            _log.info("%s", joined_text(event))
        case events.Waiting():
            _log.info("waiting for %s", event.text)
        case events.Notice():
            _log.info("%s", event.text)
        case events.Draining():
            _log.info("%s", left_text(event))


@contextmanager
def cluster_view(cluster: str, lan_key: str | None = None) -> Iterator[events.Report]:
    """Yields a function that shows a cluster's events on standard error, in the format of LLAMACLUST_LOG."""
    form = environment().log_format
    if form is LogFormat.TEXT:
        count_file_shortages()
        with _shown_by_thread(ClusterView(lan_key)) as show:
            yield show
    else:
        start_logging(form, cluster=cluster)
        yield _log_event


@contextmanager
def _shown_by_thread(view: ClusterView) -> Iterator[events.Report]:
    """Yields a function that passes events to a thread, which shows them. A blocked terminal blocks only this
    thread."""
    waiting: Queue[events.Event | None] = Queue(_MOST_WAITING)

    def show_all() -> None:
        with view:
            while (event := waiting.get()) is not None:
                view.show(event)

    def put(event: events.Event) -> None:
        with suppress(Full):
            waiting.put_nowait(event)

    thread = Thread(target=show_all, name="events", daemon=True)
    thread.start()
    try:
        yield put
    finally:
        with suppress(Full):
            waiting.put(None, timeout=_LAST_S)
        thread.join(_LAST_S)


def joined_text(joined: events.WorkerJoined) -> str:
    missing = f"; still missing: {', '.join(joined.missing)}" if joined.missing else "; all workers have joined"
    return f"worker {joined.worker} on {printable(joined.host)} has joined{missing}"


def ready_text(ready: events.Ready, lan_key: str | None = None) -> str:
    """Returns the message about a ready cluster, with commands to copy. `lan_key` is the API key for other machines, or
    a text that tells where the key is. It is None without --lan."""
    name = "" if ready.name in _UNNAMED else f" --cluster {ready.name}"
    api = own_address(ready.api)
    key = "" if ready.api_keys_file is None else f", api_key=a line of {printable(ready.api_keys_file)}"
    return f"""
{ready.name} is ready: {printable(ready.model)} at {api}
{_others_text(ready)}{_load_text(ready)}{_first_request_text(ready, api, name)}
  llamaclust status{name}
  llamaclust down{name}
  OpenAI clients: base_url={api}/v1{key}
{_lan_text(api, lan_key)}{_collector_text(ready)}{_certificate_text(ready)}"""


def _lan_text(api: str, lan_key: str | None) -> str:
    if lan_key is None:
        return ""
    host = split_address(api.partition("://")[2])[0]
    is_reached = host not in ANYWHERE and not is_loopback(host)
    place = f"{api}/" if is_reached else "cannot reach this machine, which has no network address"
    return f"  phones and other computers of this network: {place}\n  API key: {lan_key}\n"


def _others_text(ready: events.Ready) -> str:
    others = ", ".join(map(printable, ready.others))
    return f"  other models: {others}; --served-model NAME chooses a model\n" if others else ""


def _load_text(ready: events.Ready) -> str:
    body = '{"model": NAME}'
    return "" if ready.loads_on_demand else f"  no model is loaded: POST /models/load {body}\n"


def _first_request_text(ready: events.Ready, api: str, name: str) -> str:
    match ready.use:
        case events.ModelUse.TEXT:
            return f'  llamaclust chat{name}\n  llamaclust generate "Once upon a time"{name}\n  browser: {api}/'
        case events.ModelUse.EMBEDDINGS:
            path, body = "embeddings", '{"input": "Once upon a time"}'
        case _:
            path, body = "rerank", '{"query": "what do pandas eat", "documents": ["a red apple", "bamboo"]}'
    more = "" if ready.ca_file is None else f" --cacert {printable(ready.ca_file)}"
    more += "" if ready.api_keys_file is None else " -H 'Authorization: Bearer KEY'"
    return f"  curl {api}/v1/{path} -H 'Content-Type: application/json'{more} -d '{body}'"


def _collector_text(ready: events.Ready) -> str:
    return "" if ready.collector is None else f"  telemetry: {printable(ready.collector)}\n"


def _certificate_text(ready: events.Ready) -> str:
    if ready.fingerprint is None:
        return ""
    use = "" if ready.ca_file is None else f"\n  other machines: --ca-file with a copy of {printable(ready.ca_file)}"
    return f"  certificate: SHA-256 {ready.fingerprint}{use}\n"


def own_address(url: str) -> str:
    """Returns the URL of an API on this machine. If the API listens on all addresses, the URL has this machine's
    address on the local network."""
    scheme, _, address = url.partition("://")
    host, port = split_address(address)
    return f"{scheme}://{joined_address(reachable_host(host), port)}"


def draining_text(draining: events.Draining) -> str:
    what = f"{_requests(draining)} finished first, for {draining.limit_s:.0f} s at most"
    return f"stopping: {what}; Ctrl-C again stops at once"


def left_text(draining: events.Draining) -> str:
    return f"stopping: {_requests(draining)} left"


def _requests(draining: events.Draining) -> str:
    return "1 request is" if draining.requests == 1 else f"{draining.requests} requests are"


@contextmanager
def step_bar(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields a function that updates a progress bar with the number of finished steps and a description."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)
