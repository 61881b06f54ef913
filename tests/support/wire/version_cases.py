"""Messages of every kind with their names and codecs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask, ScoreTask
from llamaclust.proto import control_pb2, enrolment_pb2, microbatch_pb2, sampling_pb2
from llamaclust.wire.control.codec import (
    decode_coordinator_message,
    decode_worker_message,
    encode_coordinator_message,
    encode_worker_message,
)
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs, StageTiming
from llamaclust.wire.microbatch.results import decode_result
from llamaclust.wire.security.enrolment import (
    Challenge,
    Grant,
    Refusal,
    Request,
    decode_request,
    decode_server_message,
    encode_request,
    encode_server_message,
)
from support.wire.control_messages import COORDINATOR_MESSAGES, WORKER_MESSAGES
from support.wire.slow_codec import decode_inputs, decode_microbatch, encode_result

NONCE = bytes(32)


TASKS = (SampleTask(SamplingParams(0.8, 40, logit_bias=((1, 2.0),)), 7, 0, 5), ScoreTask(3, 2))


RESULT = Result(1, 2, (RowResult(1, -0.5, ((1, -0.5),)),), (StageTiming(1, 2, 3, 4),))


Case = tuple[str, Any, Callable[[Any], bytes], Callable[[bytes], Any], Any]


CASES: list[Case] = [
    *(("WorkerMessage", m, encode_worker_message, decode_worker_message, control_pb2) for m in WORKER_MESSAGES),
    *(
        ("CoordinatorMessage", m, encode_coordinator_message, decode_coordinator_message, control_pb2)
        for m in COORDINATOR_MESSAGES
    ),
    *(
        ("EnrolmentServerMessage", m, encode_server_message, decode_server_message, enrolment_pb2)
        for m in (Challenge(b"ca", NONCE), Grant(b"certificate", 7, NONCE), Refusal("no"))
    ),
    ("EnrolmentRequest", Request("a", b"request", NONCE, NONCE), encode_request, decode_request, enrolment_pb2),
    (
        "Microbatch",
        Microbatch("m", 1, 2, (Chunk((1, 2), 0, (3, 1), 1),)),
        encode_microbatch,
        decode_microbatch,
        microbatch_pb2,
    ),
    ("SamplingInputs", SamplingInputs(1, 2, TASKS), encode_inputs, decode_inputs, sampling_pb2),
    ("Result", RESULT, encode_result, decode_result, sampling_pb2),
]
