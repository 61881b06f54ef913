"""Sections of the cluster file as classes, such as workers, joining, manual plans and time limits."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from llamaclust.cluster.config.errors import PlaceError
from llamaclust.cluster.config.field_docs import DocumentedModel
from llamaclust.cluster.config.values import (
    OFF,
    Address,
    Device,
    Duration,
    FilePath,
    Layers,
    Name,
    OrAuto,
    OrOff,
    OrText,
    OrWord,
    Size,
    expand_home,
    parse_ray_address,
)
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW
from llamaclust.core.addresses import JOIN_PORT
from llamaclust.core.limits import MAX_ADAPTER_SCALE, MAX_ADAPTERS, MAX_GROUP_MEMBERS, MAX_SHARE
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS
from llamaclust.model.placement import MAX_PATTERN, MAX_RULES, PlacementRule, read_rules

ImageHost = Annotated[
    str, Field(pattern=r"^(\*\.)?[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?(:[1-9][0-9]{0,4})?$", examples=["*.example.com"])
]
_LEAST_HEARTBEAT_TIMEOUT_S = 0.5
_LEAST_PROGRESS_TIMEOUT_S = 1.0
_LEAST_LEASE_S = 1.0
Mmproj = Annotated[
    Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)] | None, OrAuto(), OrOff(OFF)
]
CpuMoe = Annotated[Annotated[int, Field(ge=0, le=1 << 16)] | None, OrAuto(), OrWord("all", 1 << 16)]
LargestGroup = Annotated[Annotated[int, Field(ge=1, le=MAX_GROUP_MEMBERS)] | None, OrAuto(), OrOff(1)]
_URL = r"^https?://[^\s/?#@]+(/[^\s?#]*)?$"
_LEAST_SHARED = 1024
_MOST_SHARED = 1 << 24
"""The most shared tokens, each of which takes about 17 bytes."""
_KUBERNETES = "https://kubernetes.default.svc"


class Section(DocumentedModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class WorkerConfig(Section):
    """One worker process."""

    name: Name
    """Name of the worker in plans, logs and errors."""
    device: Device = "cpu"
    """cpu, or GPUs to use in addition to the CPU: cuda:N, or a list of these."""
    gpu_layers: Annotated[Annotated[int, Field(ge=0, le=1 << 16)] | None, OrAuto()] = None
    """Number of the stage's last layers that are on GPUs, the others on the CPU; auto: as many as VRAM takes."""
    gpu_memory: Size | None = None
    """Most memory that the worker takes of each GPU; by default all that is free."""
    cpu_moe: CpuMoe = None
    """The worker's own `cpu_moe`; by default the cluster's."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Compute threads; by default an equal share of the machine's cores."""
    numa_node: Annotated[int, Field(ge=0, le=1023)] | None = None
    """NUMA node whose cores and memory are used; by default one per worker if nodes can hold equally many workers."""
    memory: Size | None = None
    """Most RAM for weights, KV memory and workspace; by default a share of the free memory."""
    mlock: bool = False
    """true: weights are locked in RAM, so that they are never swapped out."""
    kv_disk: Size | None = None
    """Most KV memory on the machine's disk, for use after restarts. All workers set it or none; by default none."""
    memory_bandwidth_gb_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Memory read bandwidth in GB/s, for plans; by default measured when the worker starts."""
    int8_gmac_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    """Integer multiply-accumulates in GMAC/s, for plans; by default measured when the worker starts."""

    @model_validator(mode="after")
    def _check_speeds(self) -> Self:
        if (self.memory_bandwidth_gb_s is None) != (self.int8_gmac_s is None):
            given = "memory_bandwidth_gb_s" if self.int8_gmac_s is None else "int8_gmac_s"
            why = "memory_bandwidth_gb_s and int8_gmac_s go together: give both, or none to have them measured"
            raise PlaceError((given,), why)
        if self.memory_bandwidth_gb_s is not None and self.device != "cpu":
            why = "describes a processor, but a worker with GPUs measures itself; remove it"
            raise PlaceError(("memory_bandwidth_gb_s",), why)
        return self


class AnyWorker(WorkerConfig):
    """A worker of any name. `workers: 3` stands for three of them."""


class Join(Section):
    """Addresses at which workers on other machines join."""

    listen: Address = f"0.0.0.0:{JOIN_PORT}"
    """HOST:PORT of the enrolment port, which serves only to give certificates to workers."""
    members: Address = "0.0.0.0:7101"
    """HOST:PORT for workers that have certificates. They learn it at enrolment."""
    addresses: tuple[Address, ...] = Field(default=(), max_length=16, strict=False)
    """HOST:PORT of the coordinator and its standbys, for the worker command that `up` prints."""
    discover: bool = False
    """true: `listen` is announced by multicast DNS, so that `llamaclust worker --discover` needs no address."""
    wait: Duration = 600.0
    """Time that `up` waits for its workers."""
    trust_dir: FilePath | None = None
    """Folder of the certificate authority and the join token; by default `trust` in the cluster's state directory."""


class Ray(Section):
    """The Ray cluster that starts and places the workers."""

    address: Annotated[str, BeforeValidator(parse_ray_address)] = "auto"
    """auto: the Ray cluster of this machine, else a new one; HOST:PORT: that of this head node; none: a new one."""
    strategy: Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"] = "SPREAD"
    """Ray's placement strategy for the workers."""
    allow_unauthenticated: bool = False
    """true: the Ray cluster may lack token authentication. Every client that reaches it can then run programs on it."""


class Lease(Section):
    """The Kubernetes Lease that one of several coordinators holds. The holder serves, the others wait."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$", examples=["llamaclust"])]
    """Name of the Lease, which must exist."""
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", examples=["default"])] = "default"
    """Namespace of the Lease."""
    duration: Duration = 15.0
    """Age at which another coordinator takes the Lease, 1 s or more. The holder ends at two thirds of this age."""
    api: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+$", examples=[_KUBERNETES])] = _KUBERNETES
    """URL of the Kubernetes API server."""
    account: FilePath = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    """Folder of the service account's `token` and the API server's `ca.crt`."""

    @model_validator(mode="after")
    def _check_duration(self) -> Self:
        if self.duration < _LEAST_LEASE_S:
            raise PlaceError(("duration",), f"{self.duration:g} s is too short for renewals; set 1s or more")
        return self


class ListenTls(Section):
    """TLS of the HTTP API. Without keys, a self-signed certificate is made at the first start."""

    certificate: FilePath | None = None
    """PEM file of the certificate, followed by those of its authorities. It is read again when it changes."""
    key: FilePath | None = None
    """PEM file of the certificate's private key, without a password and unreadable for other users."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for name, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(self, name) is None and getattr(self, other) is not None:
                raise PlaceError((other,), f"certificate and key go together: give {name} as well")
        return self


class Api(Section):
    """Paths, model names and fields of the HTTP API."""

    prefix: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]{1,63}){0,8}$", examples=["/llm"])] = ""
    """Prefix of all paths, such as /llm. Paths without the prefix are served too."""
    strict: bool = False
    """true: fields that are unknown or have no effect are refused. By default, a header of the reply names them."""
    strict_model: Annotated[bool | None, OrAuto()] = None
    """true: a request must name the served model; auto: only on OpenAI's paths."""
    model_name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Name of the served model; by default its catalog name or its file's name."""
    aliases: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = ()
    """Further names of the served model."""
    tags: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = ()
    """Tags of the model in `/v1/models`."""
    pull: bool = False
    """true: clients may download catalog models by `/api/pull`. With API keys, only clients with the first key may."""
    adapter_folder: FilePath | None = None
    """Folder of adapters for `/v1/load_lora_adapter`. With API keys, only clients with the first key may load them."""
    slot_folder: FilePath | None = None
    """Folder of saved slots; without it, `POST /slots` is refused."""
    image_urls: Annotated[tuple[ImageHost, ...], Field(max_length=64, strict=False)] = ()
    """Hosts whose images are fetched if a request has their URLs, such as example.com, *.example.com or
    example.com:8080. By default, requests must send images as data URLs."""
    disabled: Annotated[
        tuple[Literal["docs", "metrics", "props", "slots"], ...], Field(max_length=4, strict=False)
    ] = ()
    """Endpoints that are switched off and answered 501."""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Default values of request fields, such as temperature. Each endpoint takes those of its own fields."""


class AdapterConfig(Section):
    """A LoRA adapter of the model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$", examples=["poet"])]
    """Name of the adapter, which requests give as their model."""
    path: FilePath
    """The adapter's GGUF file. A worker that lacks it here and in its models folder fetches its layers."""
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE, allow_inf_nan=False)] = 1.0
    """Scale of the adapter in requests that name it."""


class Telemetry(Section):
    """Export of traces and metrics by OpenTelemetry. Keys that are not set come from the variables OTEL_*."""

    endpoint: Annotated[str, Field(pattern=_URL, max_length=2048, examples=["http://localhost:4318"])] | None = None
    """URL of a collector that accepts OTLP over HTTP; `/v1/traces` and `/v1/metrics` are appended."""
    headers_file: FilePath | None = None
    """File of headers for the collector, one NAME=VALUE per line, mode 0600."""
    sample_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Fraction of requests that are traced; a client's trace context overrides it."""


class PlanEntry(Section):
    """One stage of a manual plan."""

    worker: Name | None = None
    """Name of the worker that holds these layers."""
    workers: Annotated[tuple[Name, ...], Field(min_length=2, max_length=MAX_GROUP_MEMBERS, strict=False)] | None = None
    """Names of several workers that hold these layers as a group, in place of `worker`. The first leads the group."""
    shares: (
        Annotated[
            tuple[Annotated[int, Field(ge=1, le=MAX_SHARE)], ...],
            Field(min_length=2, max_length=MAX_GROUP_MEMBERS, strict=False),
        ]
        | None
    ) = None
    """Relative share of each layer that each of `workers` holds; by default equal shares."""
    layers: Layers
    """Half-open range [start, end) of layers. 4.5 is a border after half of the experts of layer 4."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.workers or (() if self.worker is None else (self.worker,))

    @property
    def all_shares(self) -> tuple[int, ...]:
        return self.shares or (1,) * len(self.workers or ())

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if (self.worker is None) == (self.workers is None):
            given = "names no worker" if self.worker is None else "has both"
            raise PlaceError((), f"{given}: give `worker`, or `workers` for a group")
        if self.workers is None and self.shares is not None:
            raise PlaceError(("shares",), "is for groups, but this stage has one worker; remove it")
        if self.workers and self.shares and len(self.shares) != len(self.workers):
            raise PlaceError(("shares",), f"{len(self.shares)} shares for {len(self.workers)} workers; give one each")
        return self


class Speculative(Section):
    """Speculative decoding: a step computes an answer's last token and drafted tokens, and may yield several tokens."""

    max_window: Annotated[int, Field(ge=1, le=MAX_WINDOW)] = MAX_WINDOW
    """Most drafted tokens of a sequence in a step. Their number follows from the predicted gain."""
    shared_answers: Annotated[int, Field(ge=0, le=_MOST_SHARED)] = 0
    """Tokens of recent answers from which requests with the same `cache_salt` draft: 1024 or more, or 0 for none."""
    model: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)] | None = None
    """Draft model, given like the key `model`: small, with the same tokens. It runs on the coordinator's machine."""
    mtp: bool = False
    """true: draft with the model's own head for multi-token prediction (MTP), which the last stage loads."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of the draft model; by default one per core."""

    @model_validator(mode="after")
    def _check_draft_model(self) -> Self:
        if self.threads is not None and self.model is None:
            raise PlaceError(("threads",), "these threads are for a draft model: set speculative.model, or remove them")
        return self

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        if 0 < self.shared_answers < _LEAST_SHARED:
            why = f"{self.shared_answers} tokens are too few for an answer; set {_LEAST_SHARED} or more, or 0 for none"
            raise PlaceError(("shared_answers",), why)
        return self


class PlacementEntry(Section):
    """A rule that puts tensors in RAM or on GPUs. It applies to layers of workers with GPUs."""

    tensors: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
    """Regular expression that may match anywhere in a tensor's name, such as ffn_.*_exps."""
    device: Annotated[str, Field(min_length=1, max_length=16)]
    """ram or CPU; gpu; or CUDA0 or cuda:0 to choose one of several GPUs."""
    workers: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=63)], ...], Field(max_length=64, strict=False)
    ] = ()
    """Names of the workers that the rule applies to, or patterns such as gpu-*; by default all workers."""

    @property
    def rule(self) -> PlacementRule:
        return PlacementRule.of(self.tensors, self.device)

    def is_for(self, worker: str) -> bool:
        return not self.workers or any(fnmatchcase(worker, pattern) for pattern in self.workers)

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        try:
            PlacementRule.of("x", self.device)
        except ValueError as error:
            raise PlaceError(("device",), str(error)) from error
        try:
            PlacementRule.of(self.tensors, "ram")
        except ValueError as error:
            raise PlaceError(("tensors",), str(error)) from error
        return self


def _read_placement(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [_entry(item) if isinstance(item, str) else item for item in value]


def _entry(text: str) -> dict[str, str]:
    rules = list(read_rules(text))
    if len(rules) != 1:
        raise ValueError(f"{text[:60]!r} has {len(rules)} rules; make each its own item")
    return {"tensors": rules[0].pattern, "device": rules[0].device}


Placements = Annotated[
    tuple[PlacementEntry, ...],
    Field(max_length=MAX_RULES, strict=False),
    BeforeValidator(_read_placement),
    OrText(),
]


class ModelEntry(Section):
    """One of several models of a cluster."""

    model: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)]
    """Catalog name or file, like the cluster's key `model`."""
    name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Name of the model for clients; by default its catalog name or its file's name."""
    aliases: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = ()
    """Further names of the model."""
    chat_template: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Name of a built-in chat template, or a Jinja file, like the cluster's key `chat_template`."""
    mmproj: Mmproj = None
    """Projector of this model, like the cluster's key `mmproj`."""
    context_length: Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)] | None = None
    """Most tokens of a sequence; by default the cluster's number."""
    kv_memory: Annotated[Size | None, OrAuto()] = None
    """Most KV memory per worker; auto: the cluster's `kv_memory`."""
    keep_alive: Annotated[Duration | None, OrAuto()] = None
    """Time that the model stays loaded without requests; auto: until another model needs its memory."""
    adapters: Annotated[tuple[AdapterConfig, ...], Field(max_length=MAX_ADAPTERS, strict=False)] = ()
    """LoRA adapters of this model, like the cluster's key `adapters`."""
    placement: Placements = ()
    """Rules for tensors of this model, like the cluster's key `placement`."""
    plan: Annotated[tuple[PlanEntry, ...] | None, Field(min_length=1, max_length=256, strict=False), OrAuto()] = None
    """Plan of this model, like the cluster's key `plan`."""


class Timeouts(Section):
    """Time limits. They are in seconds once they are read."""

    request: Duration = 600.0
    """Time between a request's arrival and its last token."""
    worker: Duration = 5.0
    """Silence after which a worker counts as lost; 500 ms at least."""
    load: Duration = 60.0
    """Time without progress after which a loading worker counts as lost; 1 s at least."""
    recovery: Duration = 120.0
    """Time that requests wait for a worker if the present ones cannot hold the model. Then the requests fail."""
    resume: Duration = 30.0
    """Time that a reply is kept for a client that lost its connection."""
    idle: Duration = 75.0
    """Time that a client's idle connection is kept; should exceed the time of a proxy in front of the API."""
    coordinator: Duration = 600.0
    """Time that remote workers keep their weights and wait for a lost coordinator."""

    @model_validator(mode="after")
    def _check_worker(self) -> Self:
        if self.worker < _LEAST_HEARTBEAT_TIMEOUT_S:
            why = "is too short to detect a lost worker; set 500ms or more"
            raise PlaceError(("worker",), f"{self.worker:g} s {why}")
        if self.load < _LEAST_PROGRESS_TIMEOUT_S:
            raise PlaceError(("load",), f"{self.load:g} s is too short to detect a load that hangs; set 1s or more")
        return self
