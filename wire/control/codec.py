from __future__ import annotations

from llamaclust.proto import control_pb2 as proto
from llamaclust.wire.codec import Envelope
from llamaclust.wire.control.messages import CoordinatorMessage, WorkerMessage

MAX_CONTROL_BYTES = 1 << 20

_worker: Envelope[WorkerMessage] = Envelope(proto.WorkerMessage, WorkerMessage, MAX_CONTROL_BYTES)
_coordinator: Envelope[CoordinatorMessage] = Envelope(proto.CoordinatorMessage, CoordinatorMessage, MAX_CONTROL_BYTES)

encode_worker_message = _worker.encode
decode_worker_message = _worker.decode
encode_coordinator_message = _coordinator.encode
decode_coordinator_message = _coordinator.decode
