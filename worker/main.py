"""The worker process. It opens its device, joins the coordinator, serves stages, and ends with the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from typing import NoReturn

from llamaclust.core.errors import DeadlineError, DeviceLostError, LlamaclustError, UsageError, WorkerError
from llamaclust.core.logs import LogFormat, start_logging
from llamaclust.core.process_settings import allow_many_files, collect_rarely, share_interpreter
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.sched_slice import USUAL_SLICE_NS, request_slices
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.devices.cores import bind_to_node
from llamaclust.worker.membership import Member
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.worker import Worker

_log = logging.getLogger("llamaclust.worker")

_GRACE_S = 0.5
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_worker(settings: WorkerSettings) -> int:
    """Runs a worker and returns its exit code. Logs errors, but raises UsageError if the log format is TEXT."""
    start_logging(settings.log_format, cluster=settings.cluster, worker=settings.name)
    allow_many_files()
    request_slices(USUAL_SLICE_NS)
    share_interpreter()
    gc.freeze()
    collect_rarely()
    try:
        if settings.parent_pid is not None:
            _set_parent_death_signal(settings.parent_pid)
        if settings.numa_node is not None:
            bind_to_node(settings.numa_node)
        return asyncio.run(_until_signal(settings))
    except LlamaclustError as error:
        if isinstance(error, UsageError) and settings.log_format is LogFormat.TEXT:
            raise
        _log.error("%s", error)
        return error.exit_code
    except Exception:  # noqa: BLE001  any error must reach the log
        _log.exception("the worker failed")
        return 1


def end_process(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _set_parent_death_signal(parent_pid: int) -> None:
    """Makes Linux kill this process when the thread that started it ends. Exits if the parent has already ended."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise SystemExit(f"the process that started this worker (pid {parent_pid}) has ended")


async def _until_signal(settings: WorkerSettings) -> int:
    if settings.static:
        from llamaclust.worker.static import run_static_worker as run
    else:
        run = _run_started_worker
    running = asyncio.create_task(run(settings))
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        running.cancel()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        _log.info("ends: %s", await running)
    except asyncio.CancelledError:
        _log.info("stopping: received %s", " and ".join(number.name for number in received))
    finally:
        for number in _SIGNALS:  # A signal that comes while the event loop closes would print a traceback.
            signal.signal(number, signal.SIG_IGN)
    return 0


async def _run_started_worker(settings: WorkerSettings) -> str:
    if not settings.token:
        raise UsageError("the settings have no cluster token")
    token = ClusterToken(settings.token)
    worker = Worker.open(settings)
    coordinator = Peer(settings.join, token)
    listen = settings.listen or "127.0.0.1:0"
    server = await Server.start(listen, token, worker.handlers)
    try:
        await worker.accept_links(listen, settings.link_port, token)
        member = Member(worker, token)
        registration = worker.device.registration(settings.name, server.address, worker.links.address)
        await member.join(coordinator, registration, settings.join_s)
        links = worker.links.address or "no port"
        where = f"its stages are served at {server.address}, links of groups at {links}"
        _log.info("worker %s is a member, %s", settings.name, where)
        return await worker.compute.run_until_device_lost(member.serve())
    except DeviceLostError:
        raise
    except WorkerError as error:
        raise WorkerError(f"the coordinator is gone: {error}") from error
    finally:
        worker.compute.close()
        with contextlib.suppress(DeadlineError):
            async with deadline("closing streams", _GRACE_S):
                await coordinator.close()
                await server.stop(0.0)
                await worker.links.stop()
