"""Runs a cluster and its HTTP API in this process."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.http.gates import Admission
from llamaclust.cluster.front.http.server import StartingReplies, server_config
from llamaclust.cluster.front.http.sse import first_of
from llamaclust.cluster.front.models import ApiModel
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.server.front import (
    Front,
    api_models,
    api_settings,
    cluster_record,
    open_port,
    ready_event,
)
from llamaclust.cluster.server.signals import Signals
from llamaclust.cluster.server.status import cluster_status
from llamaclust.cluster.server.telemetry.telemetry import Telemetry, open_telemetry, resolve_telemetry
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Draining, Notice, Report
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import (
    Instant,
    RequestContext,
    found_unanswered,
    left_unanswered,
    read_journal,
)
from llamaclust.core.errors import ClusterStoppingError, LlamaclustError, SupersededError
from llamaclust.core.process_settings import allow_many_files, collect_rarely, share_interpreter

_DRAIN_S = 30.0
_LOOK_S = 0.2
_START_S = 10.0
_END_S = 5.0

_log = logging.getLogger(__name__)


def serve(config: ClusterConfig, model_paths: Sequence[Path], report: Report, *, is_standby: bool = False) -> int:
    """Runs a cluster until SIGINT, SIGTERM or SIGHUP. Running requests are finished, unless a second signal comes. If
    `is_standby` is true, first waits until the cluster's running coordinator ends. Returns 128 + SIGINT if SIGINT
    interrupted the start, and 0 otherwise. Raises UsageError if the name or port is taken or the API keys are invalid,
    and the errors of `open_cluster`."""
    folder = ClusterDir(config.state_dir / config.name)
    settings, telemetry = api_settings(config), resolve_telemetry(config)
    if config.lease is not None:
        # This module loads an HTTP client, which is not needed without a Lease.
        from llamaclust.cluster.server.leadership import leading

        with open_port(config, folder) as port, leading(config.lease, port, settings, report) as is_leader:
            if is_leader:
                front = Front(port, cluster_record(config, folder, port), settings, telemetry, report)
                with folder.kept():
                    return _run(config, model_paths, folder, front)
        return 0
    if is_standby:
        report(Notice(f"{config.name}: this standby takes over when no other coordinator runs"))
    with folder.locked(is_standby=is_standby) as is_held:
        if not is_held:
            report(Notice(f"{config.name} was stopped, so this standby ends too"))
            return 0
        if is_standby:
            report(Notice(f"{config.name}: no other coordinator runs, so this standby serves now"))
        with open_port(config, folder) as port:
            front = Front(port, cluster_record(config, folder, port), settings, telemetry, report)
            return _run(config, model_paths, folder, front)


def _run(config: ClusterConfig, model_paths: Sequence[Path], folder: ClusterDir, front: Front) -> int:
    share_interpreter()
    is_interrupted = asyncio.run(_until_signal(config, model_paths, folder, front))
    _report_line(front, left_unanswered(folder.journal))
    return 128 + signal.SIGINT if is_interrupted else 0


def _report_line(front: Front, line: str) -> None:
    if line:
        front.report(Notice(f"{front.record.name}: {line}"))


async def _until_signal(config: ClusterConfig, model_paths: Sequence[Path], folder: ClusterDir, front: Front) -> bool:
    signals = Signals()
    try:
        if front.port.certificate is not None:
            front.port.certificate.publish(folder.api_certificate)
        folder.write_record(front.record)
        async with (
            _starting_replies(config, front) as replies,
            open_cluster(config, model_paths, folder, replies.report) as cluster,
        ):
            replies.close()
            _settle_memory()
            await _answer(cluster, folder, front, signals)
    except asyncio.CancelledError:
        if not signals.stop_requested.is_set():
            raise
    finally:
        folder.remove_record(is_stopped=signals.stop_requested.is_set())
    return signals.has_interrupted_start


def _starting_replies(config: ClusterConfig, front: Front) -> StartingReplies:
    is_live = config.lease is not None
    return StartingReplies(front.port, front.settings, front.report, is_live=is_live)


def _settle_memory() -> None:
    gc.collect()
    gc.freeze()
    collect_rarely()


async def _answer(cluster: Cluster, folder: ClusterDir, front: Front, signals: Signals) -> None:
    config, admission = cluster.config, Admission(front.settings)
    allow_many_files()
    async with (
        aclosing(Journal(folder.journal, cluster.record, config.timeouts.resume)) as journal,
        # Telemetry ends after the models have aborted their sequences, so that these sequences have spans.
        _telemetry(cluster, front) as telemetry,
        api_models(cluster, front.settings, journal, partial(cluster_status, cluster, front.record)) as models,
    ):
        app = create_app(models, admission, cluster.pool.operations)
        with _left_to_the_next(journal):
            await models[0].replies.restore(await _restorable(folder, models, front))
            traced = app if telemetry is None else telemetry.traced(app)
            server = _Server(server_config(traced, front.settings, front.port))
            serving = asyncio.create_task(server.serve(sockets=front.port.listeners))
            try:
                await asyncio.wait_for(server.answers.wait(), _START_S)
                signals.ready = True
                front.report(ready_event(cluster, front))
                await first_of(_stop_requested(signals), cluster.registry.superseded())
                left = _Inheritance(journal, None if config.lease is None else cluster.registry)
                engines = [model.engine for model in models]
                await first_of(_drain(engines, admission, left), _report_requests(models, front.report))
                server.should_exit = True  # The server has some time left for replies that are being written.
                await _ended(serving)
            finally:
                server.should_exit = server.force_exit = True
                await _ended(serving)


@asynccontextmanager
async def _telemetry(cluster: Cluster, front: Front) -> AsyncIterator[Telemetry | None]:
    if front.telemetry is None:
        yield None
        return
    engines = {served.name: served.engine for served in cluster.models}
    async with open_telemetry(front.telemetry, cluster.config.name, engines, cluster.metrics) as telemetry:
        yield telemetry


@contextmanager
def _left_to_the_next(journal: Journal) -> Iterator[None]:
    try:
        yield
    except BaseException:
        journal.seal()
        raise


async def _restorable(folder: ClusterDir, models: Sequence[ApiModel], front: Front) -> list[RequestContext]:
    left = await asyncio.to_thread(_left_requests, folder.journal)
    restorable = [request for request in left if any(model.continues(request) for model in models)]
    _report_line(front, found_unanswered(left, restorable))
    return restorable


def _left_requests(path: Path) -> list[RequestContext]:
    try:
        return read_journal(path, Instant.now())
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s: cannot be read: %s; the last coordinator's requests are lost", path, error)
        return []


async def _report_requests(models: Sequence[ApiModel], report: Report) -> None:
    reported = 0
    while True:
        left = sum(model.service.active_requests for model in models)
        if left not in (0, reported):
            report(Draining(left, _DRAIN_S))
            reported = left
        await asyncio.sleep(_LOOK_S)


async def _stop_requested(signals: Signals) -> None:
    await signals.stop_requested.wait()


async def _ended(serving: asyncio.Task[None]) -> None:
    with suppress(TimeoutError):  # A server that takes longer is cancelled.
        await asyncio.wait_for(serving, _END_S)


@dataclass(frozen=True, slots=True)
class _Inheritance:
    """Hand-over to the next coordinator: the accepted requests and, if there is a Lease, the workers."""

    journal: Journal
    registry: Registry | None

    def leave(self) -> LlamaclustError:
        self.journal.stop_in_order()
        if self.registry is None:
            self.journal.end_sent()
            self.journal.seal()
            return ClusterStoppingError("the cluster is stopping")
        self.journal.seal()
        self.registry.leave_workers()
        return SupersededError("this coordinator is stopping; the next coordinator continues the request")


async def _drain(engines: Sequence[Engine], admission: Admission, left: _Inheritance) -> None:
    """Refuses new requests and finishes accepted ones. After 30 s, leaves the rest to the next coordinator."""
    admission.stop()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await asyncio.gather(*(engine.drain(_DRAIN_S) for engine in engines))
                await admission.wait_idle()
    finally:
        error = left.leave()
        for engine in engines:
            engine.shut_down(error)
        admission.end()


class _Server(uvicorn.Server):
    """An HTTP server that does not handle signals. Sets the event `answers` as soon as connections are accepted."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answers = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answers.set()
