"""Defines the sections of the cluster file, such as workers, manual plans and time limits."""

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
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.model.placement import MAX_PATTERN, MAX_RULES, PlacementRule, read_rules

ImageHost = Annotated[
    str, Field(pattern=r"^(\*\.)?[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?(:[1-9][0-9]{0,4})?$", examples=["*.example.com"])
]
_LEAST_HEARTBEAT_TIMEOUT_S = 0.5
_MOST_HEARTBEAT_TIMEOUT_S = 86400.0
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
"""Maximum value of `shared_answers`, which is a number of tokens. A token takes about 17 bytes of memory."""
_KUBERNETES = "https://kubernetes.default.svc"


class Section(DocumentedModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class WorkerConfig(Section):
    """A worker process."""

    name: Name
    """Name of the worker in plans, logs and error messages."""
    device: Device = "cpu"
    """cpu, or the GPUs that the worker uses together with the CPU, such as cuda:0 or [cuda:0, cuda:1]."""
    gpu_layers: Annotated[Annotated[int, Field(ge=0, le=1 << 16)] | None, OrAuto()] = None
    """Number of the worker's layers to put on GPUs, counted from the last. auto puts as many there as fit."""
    gpu_memory: Size | None = None
    """Maximum memory that the worker uses on each GPU. By default, all free memory."""
    cpu_moe: CpuMoe = None
    """The key `cpu_moe` for this worker. Defaults to the cluster's `cpu_moe`."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of compute threads. By default, the workers of a machine share its cores equally."""
    numa_node: Annotated[int, Field(ge=0, le=1023)] | None = None
    """NUMA node whose cores and memory the worker uses. By default, each node gets equally many workers if possible."""
    memory: Size | None = None
    """RAM limit of the worker process, including about 85 MiB for the program. By default, a share of the free
    memory."""
    mlock: bool = False
    """Set true to lock weights in RAM, so that they are never swapped out."""
    kv_disk: Size | None = None
    """Maximum size of KV blocks kept on disk for use after restarts. None by default. Set for all workers or none."""
    memory_bandwidth_gb_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Read bandwidth of RAM in GB/s, used by plans. By default, the worker measures it when it starts."""
    int8_gmac_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    """Speed of int8 multiply-accumulates in GMAC/s, used by plans. By default, the worker measures it at its start."""

    @model_validator(mode="after")
    def _check_speeds(self) -> Self:
        if (self.memory_bandwidth_gb_s is None) != (self.int8_gmac_s is None):
            given = "memory_bandwidth_gb_s" if self.int8_gmac_s is None else "int8_gmac_s"
            why = "memory_bandwidth_gb_s and int8_gmac_s go together: give both, or none to have them measured"
            raise PlaceError((given,), why)
        if self.memory_bandwidth_gb_s is not None and self.device != "cpu":
            why = "is for workers without GPUs; a worker with GPUs measures itself; remove it"
            raise PlaceError(("memory_bandwidth_gb_s",), why)
        return self


class AnyWorker(WorkerConfig):
    """A worker with any name. `workers: 3` stands for three such workers."""


class Join(Section):
    """Addresses that workers on other machines use to join the cluster."""

    listen: Address = f"0.0.0.0:{JOIN_PORT}"
    """HOST:PORT of the enrolment port, which only issues certificates to workers."""
    members: Address = "0.0.0.0:7101"
    """HOST:PORT for workers that have a certificate. They learn this port at enrolment."""
    addresses: tuple[Address, ...] = Field(default=(), max_length=16, strict=False)
    """HOST:PORT of the coordinator and its standbys. `up` prints a command with these addresses for workers."""
    discover: bool = False
    """Set true to announce `listen` by multicast DNS, so that `llamaclust worker --discover` needs no address."""
    wait: Duration = 600.0
    """Maximum time that `up` waits for workers to join."""
    trust_dir: FilePath | None = None
    """Folder of the certificate authority and the join token. Defaults to a folder in the state directory."""


class Ray(Section):
    """The Ray cluster that starts the workers."""

    address: Annotated[str, BeforeValidator(parse_ray_address)] = "auto"
    """HOST:PORT of a head node. none starts a new Ray cluster. auto uses this machine's Ray cluster, or starts one."""
    strategy: Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"] = "SPREAD"
    """Ray's placement strategy for the workers."""
    allow_unauthenticated: bool = False
    """Set true to allow a Ray cluster without token authentication. Then anyone who can connect can run programs."""


class Lease(Section):
    """The Kubernetes Lease that decides which of several coordinators serves. The others wait."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$", examples=["llamaclust"])]
    """Name of the Lease, which must exist."""
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", examples=["default"])] = "default"
    """Namespace of the Lease."""
    duration: Duration = 15.0
    """Time after the last renewal of the Lease until another coordinator can take it. At least 1 s. A holder that
    cannot renew the Lease stops after two thirds of this time."""
    api: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+$", examples=[_KUBERNETES])] = _KUBERNETES
    """URL of the Kubernetes API server."""
    account: FilePath = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    """Folder with the service account's `token` and the API server's `ca.crt`."""

    @model_validator(mode="after")
    def _check_duration(self) -> Self:
        if self.duration < _LEAST_LEASE_S:
            raise PlaceError(("duration",), f"{self.duration:g} s is too short to renew the Lease; set 1s or more")
        return self


class ListenTls(Section):
    """TLS for the HTTP API. Without files, a self-signed certificate is created at the first start."""

    certificate: FilePath | None = None
    """PEM file with the certificate, followed by its authorities' certificates. It is read again if it changes."""
    key: FilePath | None = None
    """PEM file with the certificate's private key, which has no password and which other users cannot read."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for name, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(self, name) is None and getattr(self, other) is not None:
                raise PlaceError((other,), f"certificate and key go together: give {name} as well")
        return self


class Api(Section):
    """Paths, model names and request fields of the HTTP API."""

    prefix: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]{1,63}){0,8}$", examples=["/llm"])] = ""
    """Prefix of all paths, such as /llm. Paths without the prefix work too."""
    strict: bool = False
    """Set true to refuse request fields that are unknown or have no effect. Otherwise, a reply header lists them."""
    strict_model: Annotated[bool | None, OrAuto()] = None
    """Set true to refuse requests that name another model. auto refuses them only on OpenAI's /v1 paths."""
    model_name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Name of the served model. Defaults to its catalog name or its file's name."""
    aliases: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = ()
    """Other names that clients can use for the served model."""
    tags: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = ()
    """Tags of the model in `/v1/models`."""
    pull: bool = False
    """Set true to let clients download catalog models by `/api/pull`. It needs the first API key, if there are keys."""
    adapter_folder: FilePath | None = None
    """Folder of adapters for `/v1/load_lora_adapter`. Loading needs the first API key, if there are keys."""
    slot_folder: FilePath | None = None
    """Folder of the files that `POST /slots` saves and restores. Without a folder, these requests are refused."""
    image_urls: Annotated[tuple[ImageHost, ...], Field(max_length=64, strict=False)] = ()
    """Hosts whose images the API may fetch, such as example.com, *.example.com or example.com:8080. By default,
    requests must contain images as data URLs."""
    disabled: Annotated[
        tuple[Literal["docs", "metrics", "props", "slots"], ...], Field(max_length=4, strict=False)
    ] = ()
    """Endpoints to turn off. They answer with status 501."""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Default values of request fields, such as temperature. An endpoint without such a field ignores its default."""


class AdapterConfig(Section):
    """A LoRA adapter of the model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$", examples=["poet"])]
    """Name of the adapter. A request that gives this name as its model uses the adapter."""
    path: FilePath
    """GGUF file of the adapter, or folder in PEFT's format. A worker that has no copy at this path or in its models
    folder fetches its weights."""
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE, allow_inf_nan=False)] = 1.0
    """Scale of the adapter in requests that give its name as their model."""


class Telemetry(Section):
    """Export of traces and metrics by OpenTelemetry. The OTEL_* environment variables replace keys that are not set."""

    endpoint: Annotated[str, Field(pattern=_URL, max_length=2048, examples=["http://localhost:4318"])] | None = None
    """URL of a collector that accepts OTLP over HTTP. `/v1/traces` and `/v1/metrics` are appended to it."""
    headers_file: FilePath | None = None
    """File with headers for the collector, one NAME=VALUE per line, and with mode 0600."""
    sample_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Fraction of requests to trace. If a client sends a trace context, its decision is used instead."""


class PlanEntry(Section):
    """One stage of a manual plan."""

    worker: Name | None = None
    """Name of the worker that holds the layers."""
    workers: Annotated[tuple[Name, ...], Field(min_length=2, max_length=MAX_GROUP_MEMBERS, strict=False)] | None = None
    """Names of the workers that hold the layers as a group, instead of `worker`. The first worker is the leader."""
    shares: (
        Annotated[
            tuple[Annotated[int, Field(ge=1, le=MAX_SHARE)], ...],
            Field(min_length=2, max_length=MAX_GROUP_MEMBERS, strict=False),
        ]
        | None
    ) = None
    """Relative shares of the group's members, in the order of `workers`. By default, all shares are equal."""
    layers: Layers
    """Half-open range of layers. [0, 12] means layers 0 to 11. The bound 4.5 divides layer 4 after half its experts."""

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
    """Speculative decoding. Each step checks drafted tokens together with the last token of an answer."""

    max_window: Annotated[int, Field(ge=1, le=MAX_WINDOW)] = MAX_WINDOW
    """Maximum number of drafted tokens of a sequence in a step. The actual number depends on the expected gain."""
    shared_answers: Annotated[int, Field(ge=0, le=_MOST_SHARED)] = 0
    """Number of tokens of recent answers that are searched for drafts. Requests with the same `cache_salt` share these
    answers. Give at least 1024, or 0 to share none."""
    model: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)] | None = None
    """Small draft model with the same vocabulary, given like `model`. It runs on the coordinator's machine."""
    mtp: bool = False
    """Set true to draft with the model's own layer for multi-token prediction (MTP), on the last stage."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of threads of the draft model. By default, one thread per core."""

    @model_validator(mode="after")
    def _check_draft_model(self) -> Self:
        if self.threads is not None and self.model is None:
            raise PlaceError(("threads",), "is for a draft model: set speculative.model, or remove this key")
        return self

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        if 0 < self.shared_answers < _LEAST_SHARED:
            why = f"{self.shared_answers} tokens are too few to share; set {_LEAST_SHARED} or more, or 0 to share none"
            raise PlaceError(("shared_answers",), why)
        return self


class PlacementEntry(Section):
    """A rule that places tensors in RAM or on GPUs. It affects only workers with GPUs."""

    tensors: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
    """Regular expression, such as ffn_.*_exps, that matches any part of a tensor's name."""
    device: Annotated[str, Field(min_length=1, max_length=16)]
    """Place for the tensors: ram or CPU for RAM, gpu for any GPU, CUDA0 or cuda:0 for a certain GPU."""
    workers: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=63)], ...], Field(max_length=64, strict=False)
    ] = ()
    """Names of the workers that the rule is for, or patterns such as gpu-*. By default, all workers."""

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
        raise ValueError(f"{text[:60]!r} has {len(rules)} rules; give each rule as its own list item")
    return {"tensors": rules[0].pattern, "device": rules[0].device}


Placements = Annotated[
    tuple[PlacementEntry, ...],
    Field(max_length=MAX_RULES, strict=False),
    BeforeValidator(_read_placement),
    OrText(),
]


class ModelEntry(Section):
    """A model of a cluster that serves several models."""

    model: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)]
    """Catalog name or file of the model, like the cluster's key `model`."""
    name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Name that clients use for the model. Defaults to its catalog name or its file's name."""
    aliases: Annotated[tuple[str, ...], Field(max_length=64, strict=False)] = ()
    """Other names that clients can use for the model."""
    chat_template: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Name of a built-in chat template, or a Jinja file, like the cluster's key `chat_template`."""
    mmproj: Mmproj = None
    """Projector of this model, like the cluster's key `mmproj`."""
    context_length: Annotated[Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)] | None, OrAuto()] = None
    """Maximum number of tokens in a sequence. auto uses the cluster's `context_length`."""
    kv_memory: Annotated[Size | None, OrAuto()] = None
    """Maximum KV memory of each device of a worker: RAM, or a GPU. auto uses the cluster's `kv_memory`."""
    keep_alive: Annotated[Duration | None, OrAuto()] = None
    """Time that the model stays loaded without requests. auto keeps it until another model needs the memory."""
    adapters: Annotated[tuple[AdapterConfig, ...], Field(max_length=MAX_ADAPTERS, strict=False)] = ()
    """LoRA adapters of this model, like the cluster's key `adapters`."""
    placement: Placements = ()
    """Rules that place tensors of this model, like the cluster's key `placement`."""
    plan: Annotated[tuple[PlanEntry, ...] | None, Field(min_length=1, max_length=256, strict=False), OrAuto()] = None
    """Plan of this model, like the cluster's key `plan`."""


class Timeouts(Section):
    """Time limits, such as 600s or 10min. A number without a unit means seconds."""

    request: Duration = 600.0
    """Maximum time from a request's arrival to its last token."""
    worker: Duration = 5.0
    """Time without a heartbeat after which a worker counts as lost, from 500 ms to 24 h."""
    load: Duration = 60.0
    """Time without progress after which a worker that loads weights counts as lost, at least 1 s."""
    recovery: Duration = 120.0
    """Time that requests wait for more workers if the connected ones cannot hold the model. Then the requests fail."""
    resume: Duration = 30.0
    """Time that a reply is kept for a client whose connection was lost."""
    idle: Duration = 75.0
    """Time that a client's idle connection is kept open. A proxy in front of the API should time out earlier."""
    coordinator: Duration = 600.0
    """Time that workers on other machines wait for a lost coordinator. They keep their weights meanwhile."""

    @model_validator(mode="after")
    def _check_worker(self) -> Self:
        if self.worker < _LEAST_HEARTBEAT_TIMEOUT_S:
            why = "is too short to detect a lost worker; set 500ms or more"
            raise PlaceError(("worker",), f"{self.worker:g} s {why}")
        if self.worker > _MOST_HEARTBEAT_TIMEOUT_S:
            raise PlaceError(("worker",), f"{self.worker:g} s is too long for a worker's silence; set 24h or less")
        if self.load < _LEAST_PROGRESS_TIMEOUT_S:
            raise PlaceError(("load",), f"{self.load:g} s is too short to detect a load that hangs; set 1s or more")
        return self
