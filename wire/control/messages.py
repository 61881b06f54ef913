"""Control messages between workers and their coordinator: membership, requests, loads, heartbeats. A new message needs
a dataclass here, a place in a union at the end of this file, and a proto message with the same names."""

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
    address: Address  # of its Stage service
    device: Annotated[str, Line(255)]  # "cpu" | "cuda:N", or several of the latter with commas between
    threads: Annotated[int, Integer(1, 1 << 16)]
    feature_level: Annotated[str, Line(64)]
    total_memory_bytes: MemoryBytes
    free_memory_bytes: MemoryBytes  # what its stages may take, its cap considered
    fingerprint: Annotated[str, Line(512)]  # equal for machines with equal profiles
    machine_free_bytes: MemoryBytes = 0  # what all processes of its machine may still take together; 0: unknown
    log: Annotated[str, Line(4096)] = ""  # path of its log on its machine, for people; "": the launcher knows
    gpus: Annotated[tuple[Gpu, ...], Size(0, MAX_GPUS)] = ()  # beside its processor
    gpu_layers: int | None = None  # of a stage, on its GPUs; None: as many as fit
    largest_term: Term = 0  # that its process has seen of `cluster`
    machine: Annotated[str, Line(64)] = ""  # boot id of its kernel: host names may be equal on several machines
    memory_group: Annotated[str, Line(64)] = ""  # the control group that limits its memory most; "": none does
    kv_disk_bytes: MemoryBytes = 0  # what KV memory may take on its disk; 0: none is kept there
    term_proof: TermProof = field(default_factory=TermProof)  # that a coordinator had the largest term
    cluster: Annotated[str, Line(255)] = ""  # that its process was a member of last; "": of none
    is_awaited: bool = False  # it waits for a coordinator of `cluster`, and may not join another one
    link_address: Address = ""  # where it accepts links of members of a group; "": it takes no part in groups
    protocol_version: int = PROTOCOL_VERSION
    numerics_version: int = NUMERICS_VERSION


@dataclass(frozen=True, slots=True)
class Deadlines:
    heartbeat_s: _Timeout = 1.0  # between heartbeats
    sampling_inputs_s: _Timeout = 30.0  # a last stage waits so long for a microbatch's sampling inputs
    forward_s: _Timeout = 30.0  # a stage waits so long for the next one to connect or to take a frame
    coordinator_s: Annotated[float, Real(0.0, 30 * 86400.0)] = 0.0  # a worker waits so long for a lost coordinator
    peer_s: _Timeout = 5.0  # without an answer for so long, another worker is unreachable


@dataclass(frozen=True, slots=True)
class Admitted:
    """The answer to Register. The coordinator sends it again when the coordinator's term grows."""

    deadlines: Deadlines
    protocol_version: int = PROTOCOL_VERSION
    cluster: Annotated[str, Line(255)] = ""
    term: Term = 0  # the coordinator's
    term_proof: TermProof = field(default_factory=TermProof)  # for other coordinators


@dataclass(frozen=True, slots=True)
class Rejected:
    reason: Reason


@dataclass(frozen=True, slots=True)
class Failure:
    """An error. `kind` is the error's class in llamaclust.core.errors, and `message` is its text on one line."""

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
    next_address: Address | None  # of the stage after this one; None: this is the last
    first_address: Address | None = None  # for the last: of the first stage; None: this is the first
    next_worker: WorkerName | None = None  # at next_address
    first_worker: WorkerName | None = None
    previous_worker: WorkerName | None = None  # which alone may open FORWARD; None: this is the first
    last_worker: WorkerName | None = None  # for the first of several: alone may open SAMPLED_TOKENS
    exclusive: bool = False  # stages of other epochs are freed first; weights that this one needs as well stay
    weights: WeightSources | None = None  # None: the file must be there, and its bytes are not compared
    devices: Annotated[tuple[DeviceLayers, ...], Size(0, MAX_GPUS + 1)] = ()  # in order; (): the processor alone
    adapters: AdapterFiles = ()
    group: GroupOrder | None = None  # that holds the stage together; None: this worker alone
    encoder: EncoderFile | None = None  # None: another worker has the encoder of images, or the model has none

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
            raise ProtocolError("wide_tiles is for processors, but the load puts layers on GPUs")


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
    fetched_bytes: int = 0  # from other workers
    encoder_bytes: MemoryBytes = 0  # of the encoder of images, apart from the bytes above; 0: it has none


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
    received: int  # microbatches
    sent: int = 0  # of these, their answers, at least in part
    awaits_tokens: bool = False  # the last of these waits for sampled tokens, which the last stage sends
    group: GroupCounters | None = None  # None: the worker holds the stage alone, or its links are not open


@dataclass(frozen=True, slots=True)
class Heartbeat:
    busy: Annotated[float, Real(0.0, 1.0)]  # share of the last interval spent computing
    microbatches: int
    tokens: int
    resident_bytes: MemoryBytes
    free_memory_bytes: MemoryBytes
    received_bytes: int = 0  # of microbatches, from stages before its own
    sent_bytes: int = 0  # of microbatches and results
    weight_bytes_sent: int = 0  # to other workers
    weight_bytes_received: int = 0  # from other workers
    last_error: Reason = ""  # last warning or error of its log since it joined
    gpu_free_bytes: Annotated[tuple[MemoryBytes, ...], Size(0, MAX_GPUS)] = ()  # in the order of its registration
    computing_s: Annotated[float, Real(0.0, 1e9)] = 0.0  # since the present step began; 0: none is computed
    kv_disk_written_bytes: int = 0
    kv_disk_read_bytes: int = 0
    kv_disk_used_bytes: MemoryBytes = 0
    experts_cache_hits: int = 0  # experts of layers that microbatches used, of which GPUs had copies
    experts_cache_misses: int = 0
    experts_cache_copied_bytes: int = 0  # to GPUs
    experts_cache_used_bytes: MemoryBytes = 0  # of experts that are there
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
    """Reports that the connection to another worker's stage failed to open, broke, or stopped transferring data."""

    epoch: int
    worker: WorkerName
    reason: Reason


@dataclass(frozen=True, slots=True)
class ProbePeer:
    worker: WorkerName
    address: Address  # of its Stage service
    request_id: int = 0
    permit: Permit = ""  # the coordinator's, for this link


@dataclass(frozen=True, slots=True)
class ProbeResult:
    worker: WorkerName
    reason: Reason = ""  # why it cannot be reached
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
    | ProbeResult
    | LogTail
    | KvDone
    | AdaptersSet
)
WorkerRequest = (
    ProfileWorker | ProfileLinks | FindWeights | ProbePeer | GetLog | FindKv | RestoreKv | SaveKv | SetAdapters
)
"""Requests to workers. The coordinator numbers them from 1, and each answer has its request's `request_id`."""
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
