"""Control messages between workers and their coordinator, for membership, requests, loads and heartbeats. A new message
needs a dataclass here, a place in a union at the end of this file, and a proto message with the same names."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from llamaclust.core.bounds import (
    MAX_GPUS,
    MAX_LAYERS,
    MAX_STAGES_HELD,
    UINT64,
    Address,
    Integer,
    Line,
    MemoryBytes,
    ModelId,
    ModelPath,
    Real,
    Reason,
    Size,
    WorkerName,
    bounded,
)
from llamaclust.core.epochs import MAX_TERM
from llamaclust.core.errors import ProtocolError
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.limits import NUMERICS_VERSION, StageLimits
from llamaclust.core.version import VERSION
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.groups import GroupCounters, GroupFault, GroupOrder
from llamaclust.wire.control.kv_disk import FindKv, KvDone, RestoreKv, SaveKv
from llamaclust.wire.control.logs import GetLog, LogTail
from llamaclust.wire.control.profiles import LinkProfiles, Permit, ProfileLinks, ProfileWorker, WorkerProfile
from llamaclust.wire.control.weights import (
    AdapterFiles,
    AdaptersSet,
    AddWeightSource,
    EncoderFile,
    FindWeights,
    FindWeightsProgress,
    SetAdapters,
    WeightsFound,
    WeightSources,
)
from llamaclust.wire.security.terms import TermProof

Term = Annotated[int, Integer(0, MAX_TERM)]
_Timeout = Annotated[float, Real(0.01, 86400.0)]


@dataclass(frozen=True, slots=True)
class Register:
    name: WorkerName
    pid: int
    host: Annotated[str, Line(255)]
    address: Address  # Address of the worker's Stage service.
    device: Annotated[str, Line(255)]  # For example "cpu", "cuda:0", or "cuda:0,cuda:1" for two GPUs.
    threads: Annotated[int, Integer(1, 1 << 16)]
    feature_level: Annotated[str, Line(64)]
    total_memory_bytes: MemoryBytes
    free_memory_bytes: MemoryBytes  # Memory that stages may take, within the worker's cap.
    fingerprint: Annotated[str, Line(512)]  # Machines with equal fingerprints have equal profiles.
    # Memory that all processes of the machine may still take together, or 0 if unknown.
    machine_free_bytes: MemoryBytes = 0
    log: Annotated[str, Line(4096)] = ""  # Place of the log on the worker's machine, or "" if the launcher knows it.
    gpus: Annotated[tuple[Gpu, ...], Size(0, MAX_GPUS)] = ()  # GPUs that the worker uses in addition to its processor.
    gpu_layers: int | None = None  # Number of a stage's layers on GPUs, or None for as many as fit.
    largest_term: Term = 0  # Largest term of `cluster` that the process has seen.
    # The kernel's boot id, because several machines may have the same host name.
    machine: Annotated[str, Line(64)] = ""
    # Id of the control group with the least free memory, or "" if no group limits memory.
    memory_group: Annotated[str, Line(64)] = ""
    kv_disk_bytes: MemoryBytes = 0  # Maximum size of KV memory on disk, or 0 if none is kept on disk.
    term_proof: TermProof = field(default_factory=TermProof)  # Proof that a coordinator had `largest_term`.
    cluster: Annotated[str, Line(255)] = ""  # Cluster that the worker joined last, or "" if it has joined none.
    is_awaited: bool = False  # The worker waits for a coordinator of `cluster` and cannot join another cluster.
    link_address: Address = ""  # Address for links between group members, or "" if the worker takes part in no group.
    protocol_version: int = PROTOCOL_VERSION
    numerics_version: int = NUMERICS_VERSION
    version: Annotated[str, Line(64)] = VERSION  # Version of the worker's program. "" if the program does not send it.

    @property
    def shown_version(self) -> str:
        return self.version or "an older version"


@dataclass(frozen=True, slots=True)
class Deadlines:
    heartbeat_s: _Timeout = 1.0  # Seconds between heartbeats.
    sampling_inputs_s: _Timeout = 30.0  # Maximum wait of a last stage for a microbatch's sampling inputs.
    forward_s: _Timeout = 30.0  # Maximum wait of a stage until the next stage connects or accepts a frame.
    coordinator_s: Annotated[float, Real(0.0, 30 * 86400.0)] = 0.0  # Maximum wait for a lost coordinator.
    peer_s: _Timeout = 5.0  # Seconds without an answer until another worker counts as unreachable.


@dataclass(frozen=True, slots=True)
class Admitted:
    """Accepts a worker's registration. The coordinator sends this message again each time its term grows."""

    deadlines: Deadlines
    protocol_version: int = PROTOCOL_VERSION
    cluster: Annotated[str, Line(255)] = ""
    term: Term = 0  # The coordinator's term.
    # Proof of `term`, which the worker shows to other coordinators.
    term_proof: TermProof = field(default_factory=TermProof)


@dataclass(frozen=True, slots=True)
class Rejected:
    reason: Reason


@dataclass(frozen=True, slots=True)
class Failure:
    """Describes an error. `kind` is the name of the error's class in llamaclust.core.errors. `message` is one line."""

    kind: Annotated[str, Line(64)]
    message: Reason


@dataclass(frozen=True, slots=True)
class RequestFailed:
    failure: Failure
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    epoch: Annotated[int, Integer(0, UINT64 - 1)]
    model_path: ModelPath
    model_id: ModelId
    start: int
    end: Annotated[int, Integer(1, MAX_LAYERS)]
    limits: StageLimits
    next_address: Address | None  # Address of the next stage, or None if this stage is the last.
    first_address: Address | None = None  # Address of the first stage. Set only for the last of several stages.
    next_worker: WorkerName | None = None  # Name of the worker at `next_address`.
    first_worker: WorkerName | None = None
    # The only worker that may open a FORWARD stream. None for the first stage.
    previous_worker: WorkerName | None = None
    # The only worker that may open a SAMPLED_TOKENS stream. Set only for the first of several stages.
    last_worker: WorkerName | None = None
    # The model's other stages are freed before the load, except weights that this stage also needs and that fit.
    exclusive: bool = False
    weights: WeightSources | None = None  # None if the file must be on this machine and its bytes are not compared.
    # Devices in the order of their layers, or () for the processor alone.
    devices: Annotated[tuple[DeviceLayers, ...], Size(0, MAX_GPUS + 1)] = ()
    adapters: AdapterFiles = ()
    group: GroupOrder | None = None  # Group that computes the stage, or None if this worker computes it alone.
    encoder: EncoderFile | None = None  # None if another worker runs the image encoder or the model has none.

    def check(self) -> None:
        bounded("start", self.start, 0, self.end - 1)
        held, wanted = self.devices, (self.start, self.end)
        gaps = any(lower.end != upper.start for lower, upper in pairwise(held))
        if held and (gaps or (held[0].start, held[-1].end) != wanted):
            ranges = ", ".join(f"[{part.start}, {part.end})" for part in held)
            raise ProtocolError(
                f"devices hold layers {ranges} of [{self.start}, {self.end}); expected all layers in order"
            )
        if self.limits.wide_tiles and any(part.device != "cpu" for part in held):
            raise ProtocolError("wide_tiles is for CPUs, but the load puts layers on GPUs")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    epoch: int
    done_bytes: int
    total_bytes: int

    def check(self) -> None:
        bounded("done_bytes", self.done_bytes, 0, self.total_bytes)


@dataclass(frozen=True, slots=True)
class Loaded:
    epoch: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    fetched_bytes: int = 0  # Bytes received from other workers.
    # Memory of the image encoder, which the sizes above do not include, or 0 if there is none.
    encoder_bytes: MemoryBytes = 0


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Reports that a load failed. The worker keeps nothing from the stage."""

    epoch: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Unload:
    epoch: int


@dataclass(frozen=True, slots=True)
class Unloaded:
    epoch: int


@dataclass(frozen=True, slots=True)
class UnloadFailed:
    """Reports that an unload failed. The stage no longer serves, but it may still hold memory."""

    epoch: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class StageProgress:
    epoch: int
    received: int  # Number of microbatches received.
    sent: int = 0  # Number of microbatches for which at least a part of the answer was sent.
    awaits_tokens: bool = False  # The newest microbatch waits for sampled tokens from the last stage.
    group: GroupCounters | None = None  # None if the stage has no group or the group's links are not open.


@dataclass(frozen=True, slots=True)
class Quiet:
    seconds: Annotated[float, Real(0.0, 120.0)]  # Extension of the heartbeat timeout until the next such message.


@dataclass(frozen=True, slots=True)
class Heartbeat:
    busy: Annotated[float, Real(0.0, 1.0)]  # Share of the last interval that the worker spent computing.
    microbatches: int
    tokens: int
    resident_bytes: MemoryBytes
    free_memory_bytes: MemoryBytes
    received_bytes: int = 0  # Bytes of microbatches received from earlier stages.
    sent_bytes: int = 0  # Bytes of microbatches and results that were sent.
    weight_bytes_sent: int = 0  # Bytes of weights sent to other workers.
    weight_bytes_received: int = 0  # Bytes of weights received from other workers.
    last_error: Reason = ""  # Last warning or error of the worker's log, if it is a few seconds old.
    # Free bytes of each GPU, in the order of `Register.gpus`.
    gpu_free_bytes: Annotated[tuple[MemoryBytes, ...], Size(0, MAX_GPUS)] = ()
    computing_s: Annotated[float, Real(0.0, 1e9)] = 0.0  # Seconds since the current step began, or 0 if no step runs.
    kv_disk_written_bytes: int = 0
    kv_disk_read_bytes: int = 0
    kv_disk_used_bytes: MemoryBytes = 0
    experts_cache_hits: int = 0  # Number of times that a used expert was in a GPU's cache.
    experts_cache_misses: int = 0
    experts_cache_copied_bytes: int = 0  # Bytes of experts copied to GPUs.
    experts_cache_used_bytes: MemoryBytes = 0  # Bytes of experts that are in GPUs' caches now.
    stages: Annotated[tuple[StageProgress, ...], Size(0, MAX_STAGES_HELD)] = ()


@dataclass(frozen=True, slots=True)
class Shutdown:
    reason: Reason


@dataclass(frozen=True, slots=True)
class RenewCertificate:
    certificate_request: bytes  # DER


@dataclass(frozen=True, slots=True)
class CertificateRenewed:
    certificate: bytes  # DER


@dataclass(frozen=True, slots=True)
class RenewalFailed:
    failure: Failure


@dataclass(frozen=True, slots=True)
class PeerUnreachable:
    """Reports that a connection to another worker's stage could not be opened, broke, or stopped transferring data."""

    epoch: int
    worker: WorkerName
    reason: Reason


@dataclass(frozen=True, slots=True)
class ProbePeer:
    worker: WorkerName
    address: Address  # Address of the Stage service of `worker`.
    request_id: int = 0
    permit: Permit = ""  # The coordinator's permit to measure this link.


@dataclass(frozen=True, slots=True)
class ProbeResult:
    worker: WorkerName
    reason: Reason = ""  # Reason why the worker cannot be reached, or "" if it can be reached.
    request_id: int = 0


WorkerMessage = (
    Register
    | WorkerProfile
    | RequestFailed
    | LoadProgress
    | Loaded
    | LoadFailed
    | Unloaded
    | UnloadFailed
    | Heartbeat
    | RenewCertificate
    | LinkProfiles
    | WeightsFound
    | FindWeightsProgress
    | PeerUnreachable
    | GroupFault
    | Quiet
    | ProbeResult
    | LogTail
    | KvDone
    | AdaptersSet
)
WorkerRequest = (
    ProfileWorker | ProfileLinks | FindWeights | ProbePeer | GetLog | FindKv | RestoreKv | SaveKv | SetAdapters
)
"""Requests to workers. The coordinator numbers requests from 1, and an answer has the `request_id` of its request."""
CoordinatorMessage = (
    Admitted
    | Rejected
    | Load
    | Unload
    | Shutdown
    | CertificateRenewed
    | RenewalFailed
    | AddWeightSource
    | WorkerRequest
)
