"""Control messages: what is sent is what arrives, bounds hold, newer versions are understood as far as they can be."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaclust.errors import WireError
from llamaclust.model.program import KvType
from llamaclust.proto import control_pb2
from llamaclust.wire.control import (
    KV_TYPES,
    CoordinatorMessage,
    Deadlines,
    Failure,
    Heartbeat,
    LinksMeasured,
    LinkSpeed,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Locate,
    Located,
    LocateFailed,
    LocateProgress,
    LogTold,
    Measure,
    Measured,
    MeasureLinks,
    MeasureLinksFailed,
    NewSource,
    PeerLost,
    PeerTried,
    Refused,
    Register,
    Renew,
    Renewed,
    RenewFailed,
    Shutdown,
    StageLimits,
    TellLog,
    TryPeer,
    Unload,
    Unloaded,
    WeightSource,
    WeightSources,
    Welcome,
    WorkerMessage,
)
from llamaclust.wire.control_codec import (
    decode_coordinator_message,
    decode_worker_message,
    encode_coordinator_message,
    encode_worker_message,
)
from llamaclust.wire.gpus import DeviceLayers, Gpu
from llamaclust.wire.speeds import GpuSpeed, StageTrial

REGISTER = Register("a", 7, "host", "unix:/run/a.sock", "cpu", 2, "avx2", 1 << 35, 1 << 34, "a chip, 2 cores")
GPUS = (Gpu("cuda:0", "NVIDIA X", 1 << 34, 1 << 33, "01ab"), Gpu("cuda:1", "NVIDIA Y", 1 << 33, 5))
LOAD = Load(
    3,
    "/models/m.gguf",
    "ab" * 32,
    2,
    4,
    StageLimits(64, 8, 8, 4096, 1000, window_blocks=70),
    "unix:/run/b.sock",
    next_worker="b",
)

WORKER_MESSAGES: list[WorkerMessage] = [
    REGISTER,
    replace(REGISTER, protocol=(1, 9), numerics_version=99, log="/var/log/worker.log"),
    replace(REGISTER, device="cuda:0,cuda:1", gpus=GPUS, gpu_layers=0),
    replace(REGISTER, device="cuda:0", gpus=GPUS[:1]),
    Measured(4e10, 5e11),
    Measured(4e10, 5e11, gpus=(GpuSpeed(3e12, 9e14), GpuSpeed(1e12, 1e14, (StageTrial(1, 2e-4, 1e-12, 1e-4),)))),
    Measured(4e10, 5e11, (StageTrial(1, 2e-4, 3e-11, 1e-3), StageTrial(8, 3e-4, 9e-11, 2e-3))),
    Failure("WorkerError", "no"),
    LoadProgress(3, 10, 20),
    Loaded(3, 1, 2, 3),
    Loaded(3, 1, 2, 3, 4),
    LoadFailed(3, Failure("DoesNotFitError", "12 MiB are missing")),
    Unloaded(3),
    Heartbeat(0.5, 10, 20, 30, 40),
    Heartbeat(0.5, 10, 20, 30, 40, 50, 60, 70, 80),
    Heartbeat(0.5, 10, 20, 30, 40, last_words="something went wrong"),
    Heartbeat(0.5, 10, 20, 30, 40, gpu_free_bytes=(7, 0)),
    LinksMeasured((LinkSpeed(0.001, 1e9), LinkSpeed(0.2, 1e6))),
    MeasureLinksFailed(Failure("WorkerError", "no way")),
    Located(False),
    Located(True, "ab" * 32, 7),
    LocateFailed(Failure("ModelFileError", "no")),
    LocateProgress(10, 20),
    Renew(b"request"),
    PeerLost(3, "b", "connection to host:7102 lost (keepalive watchdog timeout)"),
    PeerTried("b"),
    PeerTried("b", "not within 5 s"),
    Measured(4e10, 5e11, number=7),
    Failure("WorkerError", "no", 7),
    LinksMeasured((LinkSpeed(0.001, 1e9),), 7),
    MeasureLinksFailed(Failure("WorkerError", "no way", 7)),
    Located(False, number=7),
    Located(True, "ab" * 32, 7, 7),
    LocateFailed(Failure("ModelFileError", "no", 7)),
    PeerTried("b", "not within 5 s", 7),
    LogTold((), 0),
    LogTold(("INFO one", "", "  File x, line 7"), 12, 7),
]
COORDINATOR_MESSAGES: list[CoordinatorMessage] = [
    Welcome(Deadlines(0.5, 2.0, 3.0, 600.0), (1, 3), "home"),
    Welcome(Deadlines(0.5, 2.0, 3.0, peer_s=0.6)),
    Refused("no"),
    Measure(),
    Measure("/models/m.gguf", "ab" * 32),
    LOAD,
    replace(LOAD, start=0, next_address=None, next_worker=None),
    replace(LOAD, next_address=None, next_worker=None, first_address="unix:/a", first_worker="a"),
    replace(LOAD, previous_worker="a"),
    replace(LOAD, start=0, last_worker="c"),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="q8_0")),
    replace(LOAD, weights=WeightSources("cd" * 32, 9, (WeightSource("h:1", "b"), WeightSource("unix:/c", "c")))),
    replace(LOAD, devices=(DeviceLayers("cpu", 2, 3), DeviceLayers("cuda:0", 3, 4))),
    Locate("/models/m.gguf", "ab" * 32),
    Locate("/models/m.gguf", "ab" * 32, describe=True),
    Unload(3),
    Shutdown("end"),
    Renewed(b"certificate"),
    RenewFailed(Failure("WireError", "no")),
    MeasureLinks((("a", "unix:/a"), ("b", "host:7102"))),
    TryPeer("b", "host:7102"),
    Measure("/models/m.gguf", "ab" * 32, 7),
    MeasureLinks((("a", "unix:/a"),), 7),
    Locate("/models/m.gguf", "ab" * 32, number=7),
    TryPeer("b", "host:7102", 7),
    TellLog(7),
    NewSource("cd" * 32, WeightSource("h:1", "b")),
]


@pytest.mark.parametrize("message", WORKER_MESSAGES, ids=lambda message: type(message).__name__)
def test_what_a_worker_says_arrives(message: WorkerMessage) -> None:
    assert decode_worker_message(encode_worker_message(message)) == message


@pytest.mark.parametrize("message", COORDINATOR_MESSAGES, ids=lambda message: type(message).__name__)
def test_what_a_coordinator_says_arrives(message: CoordinatorMessage) -> None:
    assert decode_coordinator_message(encode_coordinator_message(message)) == message


def test_kv_types_of_the_wire_are_those_of_programs() -> None:
    assert tuple(KvType) == KV_TYPES and StageLimits(1, 1, 1, 1, 1).kv_type in KV_TYPES


def test_kinds_of_a_newer_minor_version_are_told_apart_from_damage() -> None:
    unknown = b"\xa2\x1f\x00"  # field 500, empty
    assert decode_worker_message(unknown) is None
    assert decode_coordinator_message(unknown) is None
    with pytest.raises(WireError):
        decode_worker_message(b"\xff")


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a b", ".a", "x" * 64, "a\n", "a-"])
def test_worker_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(WireError, match="worker name"):
        decode_worker_message(encode_worker_message(replace(REGISTER, name=name)))


BAD_LOADS = [
    replace(LOAD, end=LOAD.start),
    replace(LOAD, model_path=""),
    replace(LOAD, model_path="/a\0b"),
    replace(LOAD, limits=replace(LOAD.limits, max_tokens=0)),
    replace(LOAD, limits=replace(LOAD.limits, kv_blocks=0)),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="q4_0")),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="")),
    replace(LOAD, limits=replace(LOAD.limits, max_sequences=1 << 20)),
]


@pytest.mark.parametrize("order", BAD_LOADS)
def test_loads_out_of_bounds_are_refused(order: Load) -> None:
    with pytest.raises(WireError):
        decode_coordinator_message(encode_coordinator_message(order))


def test_numbers_that_are_none_are_refused() -> None:
    for message in (
        Measured(math.nan, 1.0),
        Heartbeat(math.inf, 0, 0, 0, 0),
        LoadProgress(1, 3, 2),
        LocateProgress(3, 2),
        Measured(0.0, 1e12),
        Measured(1e9, 0.0),
        Measured(1e9, 1e12, (StageTrial(1, -1e-9, 1e-11, 1e-3),)),
        Measured(1e9, 1e12, gpus=(GpuSpeed(0.0, 1e12),)),
        Measured(1e9, 1e12, gpus=(GpuSpeed(1e12, 1e12, (StageTrial(8, 0.0, 0.0, 0.0),) * 2),)),
        Heartbeat(0.5, 0, 0, 0, 1 << 62),
        Heartbeat(0.5, 0, 0, 1 << 62, 0),
        replace(REGISTER, total_memory_bytes=1 << 62),
        replace(REGISTER, free_memory_bytes=1 << 62),
        replace(REGISTER, machine_free_bytes=1 << 62),
        replace(REGISTER, gpus=(Gpu("cuda:0", "a card", 1 << 62, 0),)),
    ):
        with pytest.raises(WireError):
            decode_worker_message(encode_worker_message(message))


def test_text_from_a_peer_is_safe_to_print() -> None:
    failure = control_pb2.Failure(kind="X", message="two\nlines \x1b]0;title\x07\u202e")
    message = control_pb2.WorkerMessage(measure_failed=failure).SerializeToString()
    assert decode_worker_message(message) == Failure("X", "two lines ]0;title")


def test_logs_travel_by_their_last_lines_and_are_safe_to_print() -> None:
    many = LogTold(tuple(f"line {number} {'x' * 500}" for number in range(2000)), 10, 1)
    told = decode_worker_message(encode_worker_message(many))
    assert isinstance(told, LogTold) and 100 < len(told.lines) < 2000
    assert told.lines == many.lines[-len(told.lines) :] and told.before + len(told.lines) == 2010
    odd = LogTold(("\t indented \x1b]0;title\x07", "y" * 3000, "\ud800"), 0)
    told = decode_worker_message(encode_worker_message(odd))
    assert isinstance(told, LogTold)
    assert told.lines == ("  indented ]0;title", "y" * 1997 + "...", "\\ud800")
    for lines in ([""] * 1001, ["z" * 2001]):
        message = control_pb2.WorkerMessage(log_told=control_pb2.LogTold(lines=lines)).SerializeToString()
        with pytest.raises(WireError):
            decode_worker_message(message)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_decoded(data: bytes) -> None:
    for decode in (decode_worker_message, decode_coordinator_message):
        with contextlib.suppress(WireError):
            decode(data)


@pytest.mark.parametrize(
    "held", [[("cpu", 2, 3)], [("cpu", 2, 3), ("cuda:0", 2, 4)], [("cpu", 1, 4)], [("cpu", 2, 4), ("cuda:0", 4, 5)]]
)
def test_devices_hold_all_layers_of_a_load_each_once(held: list[tuple[str, int, int]]) -> None:
    order = replace(LOAD, devices=tuple(DeviceLayers(*one) for one in held))
    with pytest.raises(WireError, match=r"devices hold layers .* of \[2, 4\)"):
        decode_coordinator_message(encode_coordinator_message(order))
