"""A control message of every kind."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.limits import StageLimits
from llamaclust.core.profile import GpuSpeed, StageTrial
from llamaclust.wire.control.messages import (
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
    TellLog,
    TryPeer,
    Unload,
    Unloaded,
    WeightSource,
    WeightSources,
    Welcome,
    WorkerMessage,
)

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
    LoadFailed(3, Failure("InsufficientMemoryError", "12 MiB are missing")),
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
    replace(LOAD, previous_worker="a"),
    replace(LOAD, start=0, last_worker="c"),
    replace(LOAD, start=0, next_address=None, next_worker=None),
    replace(LOAD, next_address=None, next_worker=None, first_address="unix:/a", first_worker="a"),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="q8_0")),
    replace(LOAD, weights=WeightSources("cd" * 32, 9, (WeightSource("h:1", "b"), WeightSource("unix:/c", "c")))),
    replace(LOAD, devices=(DeviceLayers("cpu", 2, 3), DeviceLayers("cuda:0", 3, 4))),
    Locate("/models/m.gguf", "ab" * 32),
    Locate("/models/m.gguf", "ab" * 32, describe=True),
    Unload(3),
    Shutdown("end"),
    Renewed(b"certificate"),
    RenewFailed(Failure("ProtocolError", "no")),
    MeasureLinks((("a", "unix:/a"), ("b", "host:7102"))),
    TryPeer("b", "host:7102"),
    Measure("/models/m.gguf", "ab" * 32, 7),
    MeasureLinks((("a", "unix:/a"),), 7),
    Locate("/models/m.gguf", "ab" * 32, number=7),
    TryPeer("b", "host:7102", 7),
    TellLog(7),
    NewSource("cd" * 32, WeightSource("h:1", "b")),
]
