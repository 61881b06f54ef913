"""The `up` command, which runs a cluster in the foreground or in a detached process."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

from llamaclust.cli.interrupts import ends_at_once, exits_on_signals
from llamaclust.cli.listening import lan_key, listen_overrides
from llamaclust.cli.progress import ClusterView, announce, cluster_view, shown_progress
from llamaclust.cluster.config.catalog import lacks_projector, stored_model
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.config.values import OFF
from llamaclust.cluster.state.directory import ClusterDir, open_log
from llamaclust.cluster.state.events import Event, Notice, Ready, StartFailed, from_line, to_line
from llamaclust.core.errors import DownloadError, LlamaclustError, ModelFileError, UsageError

if TYPE_CHECKING:
    from llamaclust.tools.progress import Progress


def run_cluster(
    file: Path | None,
    overrides: list[str],
    port: int | None,
    *,
    lan: bool,
    detach: bool,
    standby: bool,
    notify: int | None,
    ranked: bool,
) -> None:
    """Runs a cluster until it ends. With `detach`, returns when the cluster is ready."""
    if port is not None or lan:
        overrides = [*overrides, *listen_overrides(file, overrides, port, lan=lan)]
    config = load_config(file, overrides)
    if notify is not None:
        _run_notifying(config, Starter(notify))
        return
    if standby and (detach or config.launcher_facts.is_one_program):
        other = "--detach" if detach else "launcher mpi, which runs workers and coordinator as one program"
        raise UsageError(f"--standby cannot be used together with {other}")
    if config.launcher_facts.is_one_program and not ranked:
        from llamaclust.cluster.launchers.mpi_rank import run_ranks

        if detach:
            raise UsageError(
                "--detach has no effect on launcher mpi: if mpirun ends, the cluster ends; run mpirun in the background"
            )
        raise SystemExit(run_ranks(config, [*_arguments(file, overrides), *(["--lan"] if lan else [])]))
    key = lan_key(config.api_keys_file) if lan and config.api_keys_file else None
    for own in config.of_each_model():
        announce(own.model)
    with shown_progress() as progress:
        models = _models(config, progress)
    if detach:
        run_detached(config, _arguments(file, overrides), key)
        return
    # Ctrl-C ends the process at once until the cluster handles signals itself.
    with ends_at_once(), cluster_view(config.name, key) as show:
        _tune_grpc()
        from llamaclust.cluster.server.serve import serve

        code = serve(config, models, show, is_standby=standby)
        show(Notice(f"{config.name} is stopped"))
    if code:
        raise SystemExit(code)


def _models(config: ClusterConfig, progress: Progress) -> list[Path]:
    for own in config.of_each_model():
        if own.mmproj not in (None, OFF):
            _model(own.mmproj, progress)
    return [_model(own.model, progress, is_auto=own.mmproj is None) for own in config.of_each_model()]


def _model(spec: str, progress: Progress, *, is_auto: bool = False) -> Path:
    """Returns the path of a model's file. Downloads a missing file and, if `is_auto` is True, a missing projector."""
    path = stored_model(spec)
    if path is not None and not (is_auto and lacks_projector(spec)):
        return path
    # This import takes a twentieth of the time of a start, so it happens only if something must be downloaded.
    from llamaclust.tools.hub.pull import pull_model

    try:
        return pull_model(spec, progress)
    except (DownloadError, ModelFileError):
        if path is None:
            raise
        return path


def _tune_grpc() -> None:
    """Sets gRPC's environment variables. Must be called before gRPC is imported."""
    from llamaclust.wire.rpc.grpc_options import tune_grpc

    tune_grpc()


def template_of(choice: str) -> str:
    """Returns the name of a built-in chat template, or the absolute path of a template file. Raises UsageError if
    `choice` is neither."""
    from llamaclust.model.chat.template_choice import built_in_names, chosen_template

    chosen_template(choice)
    return choice if choice in built_in_names() else str(Path(choice).expanduser().absolute())


def _arguments(file: Path | None, overrides: list[str]) -> list[str]:
    arguments = [str(file.absolute())] if file else []
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def _run_notifying(config: ClusterConfig, starter: Starter) -> None:
    """Serves a cluster in a detached process, and sends events to the command that started the process."""
    _tune_grpc()
    from llamaclust.cluster.server.serve import serve
    from llamaclust.tools.progress import silent

    with cluster_view(config.name) as show:

        def report(event: Event) -> None:
            (starter.report if starter.waits else show)(event)

        try:
            serve(config, _models(config, silent), report)
        except LlamaclustError as error:
            report(StartFailed(str(error), error.exit_code))
            raise


_END_S = 10.0


class Starter:
    """The command that started this process, and that waits until the cluster is ready."""

    def __init__(self, descriptor: int) -> None:
        self.waits = True
        self._pipe = os.fdopen(descriptor, "w", buffering=1)
        self._lock = Lock()
        Thread(target=self._outlive, args=(descriptor,), name="starter", daemon=True).start()

    def report(self, event: Event) -> None:
        with self._lock, suppress(BrokenPipeError):
            self._pipe.write(to_line(event))
            self.waits = not isinstance(event, Ready | StartFailed)

    def _outlive(self, descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # poll() always reports that the reading end was closed.
        poll.poll()
        with self._lock:
            if self.waits:
                os.kill(os.getpid(), signal.SIGTERM)


def run_detached(config: ClusterConfig, arguments: list[str], lan_key: str | None = None) -> None:
    """Runs `up` with these arguments in another process, and returns when the cluster is ready. Raises LlamaclustError
    if the start fails."""
    folder = ClusterDir(config.state_dir / config.name)
    # If a cluster of that name runs, locked() raises an error before that cluster's log would be emptied.
    with folder.locked():
        pass
    log = folder.log_file("coordinator")
    with exits_on_signals(signal.SIGTERM, signal.SIGHUP) as held, ExitStack() as undo:
        with held():  # A signal must not interrupt before `undo` knows the new process.
            reading, process = _spawn(arguments, log)
            # The pipe is closed after `_end` has run. If it were closed earlier, the process would get two signals.
            events = undo.enter_context(os.fdopen(reading))
            undo.callback(_end, process)
        with ClusterView(lan_key) as view:
            _watch_start(map(from_line, events), view, log)
        undo.pop_all()
        events.close()


def _spawn(arguments: list[str], log: Path) -> tuple[int, subprocess.Popen[bytes]]:
    reading, writing = os.pipe()
    to_log = open_log(log, anew=True)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamaclust", "up", *arguments, "--notify", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=to_log,
            stderr=to_log,
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        os.close(writing)
        os.close(to_log)
    return reading, process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _watch_start(events: Iterator[Event], view: ClusterView, log: Path) -> None:
    for event in events:
        view.show(event)
        if isinstance(event, Ready):
            return
        if isinstance(event, StartFailed):
            failure = LlamaclustError(event.message)
            failure.exit_code = event.exit_code
            raise failure
    raise LlamaclustError(f"the coordinator ended before the cluster was ready: see {log}")
