"""Tests of control messages: encoding, limits, and messages of newer versions."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.limits import KV_TYPES, MAX_GROUP_MEMBERS, StageLimits
from llamaclust.core.profile import DeviceProfile, ProductTime, Profile, StepTime
from llamaclust.model.kv_type import KvType
from llamaclust.proto import control_pb2, loading_pb2
from llamaclust.wire.control.codec import (
    decode_coordinator_message,
    decode_worker_message,
    encode_coordinator_message,
    encode_worker_message,
)
from llamaclust.wire.control.groups import GroupCounters
from llamaclust.wire.control.logs import LogTail
from llamaclust.wire.control.messages import (
    CoordinatorMessage,
    Failure,
    Heartbeat,
    Load,
    LoadProgress,
    RequestFailed,
    StageProgress,
    WorkerMessage,
)
from llamaclust.wire.control.profiles import WorkerProfile
from llamaclust.wire.control.weights import FindWeightsProgress
from support.wire.control_messages import COORDINATOR_MESSAGES, LOAD, REGISTER, WORKER_MESSAGES


@pytest.mark.parametrize("message", WORKER_MESSAGES, ids=lambda message: type(message).__name__)
def test_what_a_worker_says_arrives(message: WorkerMessage) -> None:
    assert decode_worker_message(encode_worker_message(message)) == message


@pytest.mark.parametrize("message", COORDINATOR_MESSAGES, ids=lambda message: type(message).__name__)
def test_what_a_coordinator_says_arrives(message: CoordinatorMessage) -> None:
    assert decode_coordinator_message(encode_coordinator_message(message)) == message


def test_kv_types_of_the_wire_are_those_of_programs() -> None:
    assert tuple(KvType) == KV_TYPES and StageLimits(1, 1, 1, 1, 1).kv_type in KV_TYPES


def test_unknown_kinds_are_told_apart_from_damage() -> None:
    unknown = b"\xa2\x1f\x00"  # Field 500, empty.
    for decode in (decode_worker_message, decode_coordinator_message):
        with pytest.raises(ProtocolError, match="of a kind that this version does not know"):
            decode(unknown)
        with pytest.raises(ProtocolError, match="damaged"):
            decode(b"\xff")


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a b", ".a", "x" * 64, "a\n", "a-"])
def test_worker_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="worker name"):
        decode_worker_message(encode_worker_message(replace(REGISTER, name=name)))


BAD_LOADS = [
    replace(LOAD, end=LOAD.start),
    replace(LOAD, model_path=""),
    replace(LOAD, model_path="/a\0b"),
    replace(LOAD, limits=replace(LOAD.limits, max_batch_tokens=0)),
    replace(LOAD, limits=replace(LOAD.limits, kv_blocks=0)),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="q4_0")),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="")),
    replace(LOAD, limits=replace(LOAD.limits, max_sequences=1 << 20)),
]


@pytest.mark.parametrize("order", BAD_LOADS)
def test_loads_out_of_bounds_are_refused(order: Load) -> None:
    with pytest.raises(ProtocolError):
        decode_coordinator_message(encode_coordinator_message(order))


def measured(
    read_bytes_s: float = 1e9, int8_macs_s: float = 1e12, *times: StepTime, gpus: tuple[DeviceProfile, ...] = ()
) -> WorkerProfile:
    return WorkerProfile(Profile(DeviceProfile(read_bytes_s, int8_macs_s, times), gpus))


def counted(group: GroupCounters) -> Heartbeat:
    return Heartbeat(0.5, 0, 0, 0, 0, stages=(StageProgress(1, 1, group=group),))


def test_numbers_that_are_none_are_refused() -> None:
    for message in (
        measured(math.nan, 1.0),
        Heartbeat(math.inf, 0, 0, 0, 0),
        LoadProgress(1, 3, 2),
        FindWeightsProgress(3, 2),
        measured(0.0),
        measured(1e9, 0.0),
        measured(1e9, 1e12, StepTime(1, -1e-9, 1e-11, 1e-3)),
        measured(gpus=(DeviceProfile(0.0, 1e12),)),
        measured(gpus=(DeviceProfile(1e12, 1e12, (StepTime(8, 0.0, 0.0, 0.0),) * 2),)),
        measured(gpus=(DeviceProfile(1e12, 1e12, products=(ProductTime(8, 1, 0.0),) * 2),)),
        measured(gpus=(DeviceProfile(1e12, 1e12, products=(ProductTime(8, 1, -1.0),)),)),
        Heartbeat(0.5, 0, 0, 0, 1 << 62),
        Heartbeat(0.5, 0, 0, 1 << 62, 0),
        counted(GroupCounters(waited_s=math.nan)),
        counted(GroupCounters(waited_for_s=(1.0, -1.0))),
        counted(GroupCounters(waited_for_s=(0.0,) * (MAX_GROUP_MEMBERS + 1))),
        counted(GroupCounters(one_row_waited_s=math.inf)),
        replace(REGISTER, total_memory_bytes=1 << 62),
        replace(REGISTER, free_memory_bytes=1 << 62),
        replace(REGISTER, machine_free_bytes=1 << 62),
        replace(REGISTER, gpus=(Gpu("cuda:0", "a card", 1 << 62, 0),)),
    ):
        with pytest.raises(ProtocolError):
            decode_worker_message(encode_worker_message(message))


def test_text_from_a_peer_is_safe_to_print() -> None:
    failure = loading_pb2.Failure(kind="X", message="two\nlines \x1b]0;title\x07\u202e")
    message = control_pb2.WorkerMessage(request_failed=control_pb2.RequestFailed(failure=failure)).SerializeToString()
    assert decode_worker_message(message) == RequestFailed(Failure("X", "two lines ]0;title"))


def test_errors_with_paths_that_are_not_utf_8_are_sent_escaped() -> None:
    said = "/home/caf\udce9/m.gguf:\n damaged"
    failed = RequestFailed(Failure("ModelFileError", said))
    told = RequestFailed(Failure("ModelFileError", "/home/caf\\udce9/m.gguf: damaged"))
    assert decode_worker_message(encode_worker_message(failed)) == told


def test_logs_travel_by_their_last_lines_and_are_safe_to_print() -> None:
    lines = tuple(f"line {number} {'x' * 500}" for number in range(2000))
    many = LogTail.bounded(lines, 10, 1)
    told = decode_worker_message(encode_worker_message(many))
    assert isinstance(told, LogTail) and 100 < len(told.lines) < 2000
    assert told.lines == lines[-len(told.lines) :] and told.before + len(told.lines) == 2010
    odd = LogTail.bounded(("\t indented \x1b]0;title\x07", "y" * 3000, "\ud800"), 0)
    told = decode_worker_message(encode_worker_message(odd))
    assert isinstance(told, LogTail)
    assert told.lines == ("  indented ]0;title", "y" * 1997 + "...", "\\ud800")
    for long in ([""] * 1001, ["z" * 2001]):
        message = control_pb2.WorkerMessage(log_tail=control_pb2.LogTail(lines=long)).SerializeToString()
        with pytest.raises(ProtocolError):
            decode_worker_message(message)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_decoded(data: bytes) -> None:
    for decode in (decode_worker_message, decode_coordinator_message):
        with contextlib.suppress(ProtocolError):
            decode(data)


@pytest.mark.parametrize("held", [("cpu", (3,)), ("cuda:0", (1, 2)), ("cuda:0", (4,)), ("cuda:0", (3, 2))])
def test_experts_in_ram_are_those_of_layers_on_a_gpu(held: tuple[str, tuple[int, ...]]) -> None:
    order = replace(LOAD, devices=(DeviceLayers(held[0], 2, 4, held[1]),))
    with pytest.raises(ProtocolError, match=r"holds layers \[2, 4\), but .* experts in RAM is invalid: \(.*\)"):
        decode_coordinator_message(encode_coordinator_message(order))


@pytest.mark.parametrize(
    "held", [[("cpu", 2, 3)], [("cpu", 2, 3), ("cuda:0", 2, 4)], [("cpu", 1, 4)], [("cpu", 2, 4), ("cuda:0", 4, 5)]]
)
def test_devices_hold_all_layers_of_a_load_each_once(held: list[tuple[str, int, int]]) -> None:
    order = replace(LOAD, devices=tuple(DeviceLayers(*part) for part in held))
    with pytest.raises(ProtocolError, match=r"devices hold layers .* of \[2, 4\)"):
        decode_coordinator_message(encode_coordinator_message(order))
