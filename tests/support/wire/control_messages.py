"""A control message of every kind."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.limits import StageLimits
from llamaclust.core.profile import DeviceProfile, Limits, ProductTime, Profile, StepTime
from llamaclust.wire.control.groups import GroupCounters
from llamaclust.wire.control.kv_disk import FindKv, KvDone, RestoreKv, SaveKv
from llamaclust.wire.control.logs import GetLog, LogTail
from llamaclust.wire.control.messages import (
    Admitted,
    CertificateRenewed,
    CoordinatorMessage,
    Deadlines,
    Failure,
    Heartbeat,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    PeerUnreachable,
    ProbePeer,
    ProbeResult,
    Quiet,
    Register,
    Rejected,
    RenewalFailed,
    RenewCertificate,
    RequestFailed,
    Shutdown,
    StageProgress,
    Unload,
    Unloaded,
    UnloadFailed,
    WorkerMessage,
)
from llamaclust.wire.control.profiles import (
    LinkEnd,
    LinkProfile,
    LinkProfiles,
    ProfileLinks,
    ProfileWorker,
    WorkerProfile,
)
from llamaclust.wire.control.weights import (
    AdapterFile,
    AdaptersSet,
    AddWeightSource,
    EncoderFile,
    FindWeights,
    FindWeightsProgress,
    SetAdapters,
    WeightsFound,
    WeightSource,
    WeightSources,
)
from llamaclust.wire.security.terms import TermProof

REGISTER = Register("a", 7, "host", "127.0.0.1:7", "cpu", 2, "avx2", 1 << 35, 1 << 34, "a chip, 2 cores")


CPU = DeviceProfile(4e10, 5e11)


GPUS = (Gpu("cuda:0", "NVIDIA X", 1 << 34, 1 << 33, "01ab"), Gpu("cuda:1", "NVIDIA Y", 1 << 33, 5))


LOAD = Load(
    3,
    "/models/m.gguf",
    "ab" * 32,
    2,
    4,
    StageLimits(64, 8, 8, 4096, 1000, window_blocks=70, state_blocks=9),
    "unix:/run/b.sock",
    next_worker="b",
)


WORKER_MESSAGES: list[WorkerMessage] = [
    REGISTER,
    replace(REGISTER, protocol_version=2, numerics_version=99, log="/var/log/worker.log"),
    replace(REGISTER, device="cuda:0,cuda:1", gpus=GPUS, gpu_layers=0),
    replace(REGISTER, device="cuda:0", gpus=GPUS[:1], largest_term=3, term_proof=TermProof(b"certificate", b"signed")),
    replace(REGISTER, kv_disk_bytes=1 << 32),
    replace(REGISTER, machine="2f0c7a9e-4f0e-4f5e-9d3b-6b1f8f0f7c11", memory_group="31:4711"),
    WorkerProfile(Profile(CPU)),
    WorkerProfile(
        Profile(CPU, (DeviceProfile(3e12, 9e14), replace(CPU, concurrent=(StepTime(1, 2e-4, 1e-12, 1e-4),))))
    ),
    WorkerProfile(Profile(replace(CPU, concurrent=(StepTime(1, 2e-4, 3e-11, 1e-3), StepTime(8, 3e-4, 9e-11, 2e-3))))),
    WorkerProfile(Profile(replace(CPU, products=(ProductTime(12, 1, 2e-11), ProductTime(12, 8, 3e-11))))),
    WorkerProfile(Profile(replace(CPU, isolated_products=(ProductTime(2, 8, 3e-11), ProductTime(12, 1, 2e-11))))),
    WorkerProfile(Profile(replace(CPU, isolated_limits=Limits(3e10, 4e11))), kept_bytes=1 << 20),
    RequestFailed(Failure("WorkerError", "no")),
    LoadProgress(3, 10, 20),
    Loaded(3, 1, 2, 3),
    Loaded(3, 1, 2, 3, 4),
    Loaded(3, 1, 2, 3, encoder_bytes=5),
    LoadFailed(3, Failure("InsufficientMemoryError", "12 MiB are missing")),
    Unloaded(3),
    UnloadFailed(3, Failure("WorkerError", "cuda:0 does not answer")),
    Heartbeat(0.5, 10, 20, 30, 40),
    Heartbeat(0.5, 10, 20, 30, 40, 50, 60, 70, 80),
    Heartbeat(0.5, 10, 20, 30, 40, last_error="something went wrong"),
    Heartbeat(0.5, 10, 20, 30, 40, gpu_free_bytes=(7, 0)),
    Heartbeat(0.5, 10, 20, 30, 40, computing_s=2.5),
    Heartbeat(0.5, 10, 20, 30, 40, stages=(StageProgress(3, 7, 6), StageProgress(4, 8, awaits_tokens=True))),
    Heartbeat(
        0.5, 10, 20, 30, 40, stages=(StageProgress(3, 7, 6, group=GroupCounters(9, 0.5, (0.0, 0.5), 7, 8, 2, 0.25)),)
    ),
    Heartbeat(0.5, 10, 20, 30, 40, stages=(StageProgress(3, 7, 6, group=GroupCounters()),)),
    Heartbeat(0.5, 10, 20, 30, 40, experts_cache_hits=7, experts_cache_misses=8, experts_cache_copied_bytes=9),
    Heartbeat(0.5, 10, 20, 30, 40, experts_cache_used_bytes=7),
    Heartbeat(0.5, 10, 20, 30, 40, kv_disk_written_bytes=7, kv_disk_read_bytes=8, kv_disk_used_bytes=9),
    LinkProfiles((LinkProfile(0.001, 1e9), LinkProfile(0.2, 1e6))),
    WeightsFound(False),
    WeightsFound(True, "ab" * 32, 7),
    FindWeightsProgress(10, 20),
    RenewCertificate(b"request"),
    PeerUnreachable(3, "b", "connection to host:7102 lost (keepalive watchdog timeout)"),
    Quiet(50.0),
    ProbeResult("b"),
    ProbeResult("b", "not within 5 s"),
    WorkerProfile(Profile(CPU), request_id=7),
    RequestFailed(Failure("WorkerError", "no"), 7),
    LinkProfiles((LinkProfile(0.001, 1e9),), 7),
    WeightsFound(False, request_id=7),
    WeightsFound(True, "ab" * 32, 7, 7),
    ProbeResult("b", "not within 5 s", 7),
    LogTail((), 0),
    LogTail(("INFO one", "", "  File x, line 7"), 12, 7),
    KvDone(250, 7),
    AdaptersSet(1, 2, 7),
]


COORDINATOR_MESSAGES: list[CoordinatorMessage] = [
    Admitted(Deadlines(0.5, 2.0, 3.0, 600.0), 2, "home"),
    Admitted(Deadlines(0.5, 2.0, 3.0, peer_s=0.6), term=(1 << 32) - 1, term_proof=TermProof(b"certificate", b"signed")),
    Rejected("no"),
    ProfileWorker(),
    ProfileWorker("/models/m.gguf", "ab" * 32),
    ProfileWorker(quant_types=(2, 19)),
    LOAD,
    replace(LOAD, previous_worker="a"),
    replace(LOAD, start=0, last_worker="c"),
    replace(LOAD, start=0, next_address=None, next_worker=None),
    replace(LOAD, next_address=None, next_worker=None, first_address="unix:/a", first_worker="a"),
    replace(LOAD, limits=replace(LOAD.limits, kv_type="q8_0")),
    replace(LOAD, limits=replace(LOAD.limits, wide_tiles=True)),
    replace(LOAD, weights=WeightSources("cd" * 32, 9, (WeightSource("h:1", "b"), WeightSource("unix:/c", "c")))),
    replace(LOAD, devices=(DeviceLayers("cpu", 2, 3), DeviceLayers("cuda:0", 3, 4))),
    replace(LOAD, devices=(DeviceLayers("cuda:0", 2, 4, (2, 3)),)),
    replace(LOAD, encoder=EncoderFile("/models/mmproj-m.gguf", "ef" * 32)),
    replace(LOAD, encoder=EncoderFile("/m.gguf", "ef" * 32, WeightSources("cd" * 32, 9, (WeightSource(),)))),
    FindWeights("/models/m.gguf", "ab" * 32),
    FindWeights("/models/m.gguf", "ab" * 32, encoder=EncoderFile("/models/mmproj-m.gguf", "ef" * 32)),
    FindWeights("/models/m.gguf", "ab" * 32, describe=True),
    FindWeights("/models/m.gguf", "ab" * 32, adapter=AdapterFile(15, "/adapters/Dichter ö", "cd" * 32)),
    SetAdapters(7),
    SetAdapters(7, (AdapterFile(0, "/a.gguf", "cd" * 32, WeightSources("ef" * 32, 3, (WeightSource(),))),)),
    Unload(3),
    Shutdown("end"),
    CertificateRenewed(b"certificate"),
    RenewalFailed(Failure("ProtocolError", "no")),
    ProfileLinks((LinkEnd("a", "unix:/a"), LinkEnd("b", "host:7102"))),
    ProbePeer("b", "host:7102"),
    ProfileWorker("/models/m.gguf", "ab" * 32, 7),
    ProfileLinks((LinkEnd("a", "unix:/a"),), 7),
    FindWeights("/models/m.gguf", "ab" * 32, request_id=7),
    ProbePeer("b", "host:7102", 7),
    GetLog(7),
    AddWeightSource("cd" * 32, WeightSource("h:1", "b")),
    FindKv(3, b"k" * 64, 7),
    RestoreKv(3, b"k" * 64, (7, 3), 7),
    SaveKv(3, b"k" * 96, (7, 3), 7),
]
