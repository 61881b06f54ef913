"""`up`: in front, or as a process of its own that tells this one how its start goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llamaclust.wire.tuning import tune_grpc

tune_grpc()

from llamaclust.cli.interrupts import ends_at_once  # noqa: E402
from llamaclust.cli.progress import shown_progress  # noqa: E402
from llamaclust.cli.watch import ClusterView  # noqa: E402
from llamaclust.cluster.config import ClusterConfig, load_config  # noqa: E402
from llamaclust.cluster.events import Event, Ready, StartFailed, from_line, to_line  # noqa: E402
from llamaclust.cluster.state import ClusterDir  # noqa: E402
from llamaclust.errors import LlamaclustError  # noqa: E402

if TYPE_CHECKING:
    from llamaclust.tools.download import Progress

_END_S = 10.0


def up(file: Path | None, overrides: list[str], port: int | None, *, detach: bool, notify: int | None) -> None:
    """Runs a cluster to its end, or returns when a detached one is ready."""
    if port is not None:
        overrides = [*overrides, f"listen={load_config(file, overrides).host}:{port}"]
    config = load_config(file, overrides)
    if notify is not None:
        _run_notifying(config, notify)
        return
    with shown_progress() as progress:
        model = pull(config, progress)
    if detach:
        _detach(config, file, overrides)
        return
    with ends_at_once(), ClusterView() as view:  # until the cluster handles signals itself
        from llamaclust.cluster.serve import serve

        serve(config, model, view.show)


def pull(config: ClusterConfig, progress: Progress) -> Path:
    """The model's file, downloaded first where it is a catalog's and not there yet."""
    from llamaclust.tools.pull import pull_model

    return pull_model(config.model, progress)


def _run_notifying(config: ClusterConfig, descriptor: int) -> None:
    """Serves as the detached process; events go to the pipe of the one that waits, later ones to the log."""
    from llamaclust.cluster.serve import serve
    from llamaclust.tools.pull import silent

    pipe = os.fdopen(descriptor, "w", buffering=1)
    view = ClusterView()

    def watch(event: Event) -> None:
        nonlocal pipe
        if pipe.closed:
            view.show(event)
            return
        try:
            pipe.write(to_line(event))
            if isinstance(event, Ready):
                pipe.close()
        except BrokenPipeError:
            pipe = open(os.devnull, "w")  # noqa: SIM115, PTH123  the one that waited is gone

    try:
        serve(config, pull(config, silent), watch)
    except LlamaclustError as error:
        watch(StartFailed(str(error), error.exit_code))
        raise


def _detach(config: ClusterConfig, file: Path | None, overrides: list[str]) -> None:
    folder = ClusterDir(config.state_dir / config.name)
    with folder.locked():  # refuses a name that is taken before its log is begun anew
        pass
    reading, writing = os.pipe()
    arguments = [str(file.absolute())] if file else []
    for override in overrides:
        arguments += ["--set", override]
    log = os.open(folder.log_file("coordinator"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamaclust", "up", *arguments, "--notify", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        os.close(writing)
        os.close(log)
    try:
        _watch_start(_events(reading), folder.log_file("coordinator"))
    except (KeyboardInterrupt, LlamaclustError):
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Returns when the process is gone; its workers end with it."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _events(descriptor: int) -> Iterator[Event]:
    with os.fdopen(descriptor) as pipe:
        for line in pipe:
            yield from_line(line)


def _watch_start(events: Iterator[Event], log: Path) -> None:
    """Shows the events; returns when the cluster is ready. LlamaclustError where it is not to be."""
    with ClusterView() as view:
        for event in events:
            view.show(event)
            if isinstance(event, Ready):
                return
            if isinstance(event, StartFailed):
                raise _failure(event)
    raise LlamaclustError(f"the coordinator ended before the cluster was ready: see {log}")


def _failure(event: StartFailed) -> LlamaclustError:
    error = LlamaclustError(event.message)
    error.exit_code = event.exit_code
    return error
