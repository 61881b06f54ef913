"""The state of one membership, with access to the coordinator and to other workers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llamaclust.core.bounds import one_line
from llamaclust.core.errors import DeviceLostError, LlamaclustError, LoadCancelledError
from llamaclust.wire.control.messages import Deadlines, Failure, LoadFailed, WorkerMessage
from llamaclust.wire.control.weights import WeightSource
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.credentials import Credentials
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.worker import Worker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    worker: Worker
    credentials: Credentials
    deadlines: Deadlines
    counters: Counters
    send: Callable[[WorkerMessage], Awaitable[None]]
    coordinator: str = ""  # Address at which the worker joined the coordinator.

    async def answer(
        self, work: Awaitable[WorkerMessage], failed: Callable[[Failure], WorkerMessage], what: str
    ) -> None:
        """Sends the result of `work`, or its failure. Sends nothing if a device was lost, because the process ends."""
        try:
            answer = await work
        except Exception as error:  # noqa: BLE001  the answer reports any error
            level = logging.INFO if isinstance(error, LoadCancelledError) else logging.ERROR
            _log.log(level, "%s: %s", what, error)
            if isinstance(error, DeviceLostError):
                self.worker.compute.give_up(error)
                return
            known = isinstance(error, LlamaclustError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            kind = type(error) if known else LlamaclustError
            answer = failed(Failure(kind.__name__, one_line(text)))
        if isinstance(answer, LoadFailed):
            gc.collect()  # A future and its error refer to each other, and keep in memory what was loaded.
        await self.send(answer)

    def peer(self, address: str, worker: str | None) -> Peer:
        principal = None if worker is None else Principal(worker)
        return Peer(address, self.credentials, principal, self.deadlines.peer_s)

    def source(self, source: WeightSource) -> Peer:
        if source.worker is None:
            return Peer(self.coordinator, self.credentials, COORDINATOR, self.deadlines.peer_s)
        return self.peer(source.address, source.worker)
