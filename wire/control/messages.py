"""What a worker and its coordinator say to each other, as dataclasses: membership, loads, signs of life."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.limits import NUMERICS_VERSION, StageLimits
from llamaclust.core.profile import GpuProfile, StageProfile
from llamaclust.wire.microbatch.messages import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Register:
    """Who a worker is; the first message of a membership."""

    name: str
    pid: int
    host: str
    address: str  # gRPC target of its Stage service
    device: str  # "cpu" | "cuda:N", or several of the latter with commas between
    threads: int
    feature_level: str
    total_memory_bytes: int
    free_memory_bytes: int  # what it may still take, its cap considered
    fingerprint: str  # equal for machines on which measurements would come out equal
    machine_free_bytes: int = 0  # what all processes of its machine may still take together; 0: not known
    log: str = ""  # where on its machine its log is, for people; "": the launcher knows
    gpus: tuple[Gpu, ...] = ()  # beside its processor
    gpu_layers: int | None = None  # of a stage, on its cards; None: as many as they have memory for
    protocol: tuple[int, int] = PROTOCOL_VERSION
    numerics_version: int = NUMERICS_VERSION


@dataclass(frozen=True, slots=True)
class Deadlines:
    """What a worker keeps to, in seconds."""

    heartbeat_s: float = 1.0  # between heartbeats
    sampling_inputs_s: float = 30.0  # a last stage waits so long for a microbatch's sampling inputs
    forward_s: float = 30.0  # a stage waits so long for the next one to connect or to take a frame
    coordinator_s: float = 0.0  # a worker waits so long for its coordinator to come back; 0: it ends at once
    peer_s: float = 5.0  # another worker that does not answer for so long is cut off


@dataclass(frozen=True, slots=True)
class Admitted:
    """The worker is a member."""

    deadlines: Deadlines
    protocol: tuple[int, int] = PROTOCOL_VERSION
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The worker is not a member; the stream ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProfileWorker:
    """Measure the machine; with a model, also what steps of its layers take."""

    model_path: str = ""
    model_id: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """What the worker's own kernels reach on its machine."""

    read_bytes_s: float
    int8_macs_s: float
    trials: tuple[StageProfile, ...] = ()  # by ascending rows; none where the model's file is not there, or no memory
    number: int = 0
    gpus: tuple[GpuProfile, ...] = ()  # in the order of its registration


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it crosses the wire: its class in llamaclust.core.errors and one line. As an answer: to
    ProfileWorker."""

    kind: str
    message: str
    number: int = 0  # of the question that it answers


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A worker that may have weights."""

    address: str  # gRPC target
    worker: str


@dataclass(frozen=True, slots=True)
class WeightSources:
    """Where a worker without the model file gets its layers."""

    manifest: str  # SHA-256, hex
    manifest_bytes: int
    sources: tuple[WeightSource, ...]  # best first


@dataclass(frozen=True, slots=True)
class FindWeights:
    """Look for a model's weights."""

    model_path: str
    model_id: str
    describe: bool = False  # make the manifest, where there is none yet
    number: int = 0


@dataclass(frozen=True, slots=True)
class WeightsFound:
    """What a worker has of a model."""

    has_file: bool
    manifest: str | None = None  # SHA-256, hex, of what it has; None: it has none
    manifest_bytes: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class FindWeightsFailed:
    """It could not be looked for."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Load:
    """Load layers [start, end) as the stage of an epoch."""

    epoch: int
    model_path: str
    model_id: str
    start: int
    end: int
    limits: StageLimits
    next_address: str | None  # gRPC target of the stage after this one; None: this is the last
    first_address: str | None = None  # for the last: gRPC target of the first stage; None: this is the first
    next_worker: str | None = None  # who holds that
    first_worker: str | None = None
    previous_worker: str | None = None  # holds the stage before this one and may open FORWARD; None: this is the first
    last_worker: str | None = None  # for the first of several: holds the last stage and may open CHOSEN
    alone: bool = False  # stages of other epochs are freed first; weights that this one needs as well stay
    weights: WeightSources | None = None  # None: the file must be there
    devices: tuple[DeviceLayers, ...] = ()  # which hold these layers, in order; (): the processor holds all


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is, in weight bytes."""

    epoch: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loaded stage takes."""

    epoch: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    fetched_bytes: int = 0  # from other workers


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Nothing of the load is kept."""

    epoch: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Unload:
    """Free weights and KV memory of an epoch's stage."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Unloaded:
    """They are freed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life; counters since the worker's start."""

    busy: float  # share of the last interval spent computing, 0 to 1
    microbatches: int
    tokens: int
    resident_bytes: int
    free_memory_bytes: int
    received_bytes: int = 0  # of microbatches, from stages before its own; 0 from older workers
    sent_bytes: int = 0  # of microbatches and results
    weight_bytes_sent: int = 0  # to other workers
    weight_bytes_received: int = 0  # from other workers
    last_words: str = ""  # of its log since it joined that tell of trouble
    gpu_free_bytes: tuple[int, ...] = ()  # in the order of its registration


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The cluster ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class RenewCertificate:
    """A new certificate is wanted, before the old one ends."""

    certificate_request: bytes  # DER


@dataclass(frozen=True, slots=True)
class CertificateRenewed:
    """A certificate of the name that the present one has."""

    certificate: bytes  # DER


@dataclass(frozen=True, slots=True)
class RenewalFailed:
    """There is none."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class ProfileLinks:
    """Measure the links to other workers, one after the other."""

    ends: tuple[tuple[str, str], ...]  # (name, gRPC target of its Stage service)
    number: int = 0


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Of a link, as its caller sees it."""

    round_trip_s: float  # until a token's hidden state was taken and answered
    bytes_s: float  # of a stream of large messages


@dataclass(frozen=True, slots=True)
class LinkProfiles:
    """In the order of the question."""

    links: tuple[LinkProfile, ...]
    number: int = 0


@dataclass(frozen=True, slots=True)
class ProfileLinksFailed:
    """A link could not be measured."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class FindWeightsProgress:
    """How much of the model's file was read, in bytes."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PeerUnreachable:
    """A stage's connection to another worker's broke, stands still, or cannot be made."""

    epoch: int
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProbePeer:
    """Look whether another worker can be reached."""

    worker: str
    address: str  # gRPC target of its Stage service
    number: int = 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether it answered."""

    worker: str
    reason: str = ""  # why it cannot be reached
    number: int = 0


@dataclass(frozen=True, slots=True)
class GetLog:
    """Tell the last lines of the log."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class LogTail:
    """The last lines of a process's log, oldest first."""

    lines: tuple[str, ...]
    before: int  # so many lines were before them
    number: int = 0


@dataclass(frozen=True, slots=True)
class AddWeightSource:
    """Loads under way that fetch weights of this manifest may ask this worker, wherever it was before."""

    manifest: str  # SHA-256, hex
    source: WeightSource


WorkerMessage = (
    Register
    | WorkerProfile
    | Failure
    | LoadProgress
    | Loaded
    | LoadFailed
    | Unloaded
    | Heartbeat
    | RenewCertificate
    | LinkProfiles
    | ProfileLinksFailed
    | WeightsFound
    | FindWeightsFailed
    | FindWeightsProgress
    | PeerUnreachable
    | ProbeResult
    | LogTail
)
WorkerRequest = ProfileWorker | ProfileLinks | FindWeights | ProbePeer | GetLog
"""The coordinator counts them, from 1; answers have their `number`, or 0 from workers older than numbers."""

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
