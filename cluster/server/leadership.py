"""Waits until this coordinator holds a Kubernetes Lease. Meanwhile, its API answers that it is waiting."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llamaclust.cluster.config.sections import Lease
from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.front.http.server import StartingReplies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.server.signals import Signals
from llamaclust.cluster.state.events import Report, Waiting
from llamaclust.cluster.state.lease import LeaseLock, held
from llamaclust.core.errors import LlamaclustError

_log = logging.getLogger(__name__)


@contextmanager
def leading(lease: Lease, port: ApiPort, settings: ApiSettings, report: Report) -> Iterator[bool]:
    """Waits for the Lease, and holds it while the context is open. Yields False if a signal ended the wait."""

    def lost(reason: str) -> None:
        _log.error("this coordinator ends, because it has lost the Lease %s: %s", lease.name, reason)
        logging.shutdown()
        os._exit(1)

    lock = LeaseLock(lease)
    starting = StartingReplies(port, settings, report, is_live=True)
    try:
        if asyncio.run(_taken(lease, lock, starting)):
            with held(lock, lost):
                yield True
        else:
            if lock.renewed_s is not None:  # The signal came while the Lease was taken.
                with suppress(LlamaclustError):
                    lock.release()
            yield False
    finally:
        lock.close()


async def _taken(lease: Lease, lock: LeaseLock, starting: StartingReplies) -> bool:
    Signals()
    with suppress(asyncio.CancelledError):
        async with starting as replies:
            replies.report(Waiting(f"the Lease {lease.name}"))
            await _take(lock)
            return True
    return False


async def _take(lock: LeaseLock) -> None:
    logged = ""
    while True:
        try:
            if await asyncio.to_thread(lock.take):
                return
        except LlamaclustError as error:
            if str(error) != logged:
                _log.warning("the Lease cannot be taken yet: %s", error)
            logged = str(error)
        await asyncio.sleep(lock.retry_s)
