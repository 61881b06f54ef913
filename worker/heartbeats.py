"""Heartbeats of a worker."""

from __future__ import annotations

import asyncio
import contextlib
from time import perf_counter_ns

from llamaclust.core.errors import DeviceLostError, WorkerError
from llamaclust.core.logs import last_trouble
from llamaclust.wire.control.messages import Heartbeat
from llamaclust.worker.devices.system_info import resident_bytes
from llamaclust.worker.session import Session


async def send_heartbeats(session: Session) -> None:
    """Until the stream ends, which its reader reports."""
    counters = session.counters
    with contextlib.suppress(WorkerError):
        last_ns, busy_ns = perf_counter_ns(), counters.busy_ns
        while True:
            await asyncio.sleep(session.deadlines.heartbeat_s)
            now_ns, total_ns = perf_counter_ns(), counters.busy_ns
            try:
                heartbeat = _heartbeat(session, min(1.0, (total_ns - busy_ns) / (now_ns - last_ns)))
            except DeviceLostError as error:  # its free memory is read
                session.worker.compute.give_up(error)
                return
            await session.send(heartbeat)
            last_ns, busy_ns = now_ns, total_ns


def _heartbeat(session: Session, busy: float) -> Heartbeat:
    counters, device, weights = session.counters, session.worker.device, session.worker.weights
    return Heartbeat(
        busy,
        counters.microbatches,
        counters.tokens,
        resident_bytes(),
        device.free_memory_bytes,
        counters.received_bytes,
        counters.sent_bytes,
        weights.sent_bytes,
        weights.received_bytes,
        last_trouble(),
        tuple(gpu.free_bytes for gpu in device.gpus),
    )
