from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llamaclust.cluster.config.anchors import anchored
from llamaclust.cluster.config.document import Document, override, read_document
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.errors import PlaceError, explain, hint
from llamaclust.cluster.config.launcher_facts import LAUNCHERS, LauncherFacts, LauncherName
from llamaclust.cluster.config.model_sources import default_name
from llamaclust.cluster.config.sections import (
    AdapterConfig,
    AnyWorker,
    Api,
    CpuMoe,
    Join,
    LargestGroup,
    Lease,
    ListenTls,
    Mmproj,
    ModelEntry,
    Placements,
    PlanEntry,
    Ray,
    Section,
    Speculative,
    Telemetry,
    Timeouts,
    WorkerConfig,
)
from llamaclust.cluster.config.values import (
    Address,
    FilePath,
    Name,
    OrAuto,
    OrCount,
    Origin,
    OrSwitch,
    OrWord,
    Size,
    SizeOrZero,
    check_wire_type,
    expand_home,
    tagged,
)
from llamaclust.cluster.config.worker_count import with_named_workers
from llamaclust.core.addresses import is_loopback, joined_address, split_address
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import MAX_ADAPTERS, MAX_BATCH_TOKENS, MAX_SEQUENCES, MAX_WORKERS
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.model.kv_type import KvType

MAX_MODELS = 32


class ClusterConfig(Section):
    """A cluster: one or several models, the workers that run them, and the HTTP API."""

    # Other sections build no validator (`defer_build`), because the validator of this class includes theirs.
    model_config = ConfigDict(defer_build=False)

    name: Name = "default"
    """Name of the cluster. Two clusters on a machine cannot have the same name."""
    model: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)]
    """The model: a catalog name, a .gguf file (the first part if split), hf:REPO/FILE or pypi:PACKAGE==VERSION/FILE."""
    models: Annotated[tuple[ModelEntry, ...], Field(max_length=MAX_MODELS, strict=False)] = ()
    """Several models, instead of `model`. The first is loaded at the start, and others when requests name them."""
    max_loaded_models: Annotated[int | None, Field(ge=1, le=MAX_MODELS), OrAuto()] = None
    """Maximum number of `models` that are loaded at the same time. auto loads as many as fit in memory."""
    load_on_demand: bool = True
    """Set false to load models only by `POST /models/load`, and never at the start or for other requests."""
    chat_template: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Name of a built-in chat template, or path of a Jinja file. Defaults to the model's own template."""
    mmproj: Mmproj = None
    """Projector (image encoder), given like `model`. auto uses the only one in the model's folder. off uses none."""
    adapters: Annotated[tuple[AdapterConfig, ...], Field(max_length=MAX_ADAPTERS, strict=False)] = ()
    """LoRA adapters that requests can use, numbered from 0. Workers with GPUs do not support adapters."""
    context_length: Annotated[Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)] | None, OrAuto()] = None
    """Maximum number of tokens in a sequence, including its prompt and its answer. auto: the model's own, or as much as
    memory allows, but at least 4,096 tokens or the model's own."""
    launcher: LauncherName = "local"
    """Launcher of the workers. local starts processes on this machine, ray uses Ray, and mpi uses mpirun. With static,
    you run `llamaclust worker` on each machine."""
    join: Join = Join()
    """Addresses that workers on other machines use to join the cluster."""
    ray: Ray = Ray()
    """The Ray cluster that starts the workers."""
    insecure: bool = False
    """Set true for a static cluster without encryption or authentication. Everyone who can connect is trusted."""
    listen: Address = "127.0.0.1:8080"
    """HOST:PORT that the HTTP API listens on. Port 0 chooses any free port."""
    listen_also: tuple[Address, ...] = Field(default=(), max_length=16, strict=False)
    """Further HOST:PORT addresses that the HTTP API listens on."""
    listen_tls: Annotated[ListenTls | None, OrWord("self-signed")] = None
    """HTTPS instead of plain HTTP for the API. Give self-signed, or a section with the files of a certificate."""
    workers: Annotated[
        tuple[WorkerConfig, ...],
        Field(min_length=1, max_length=MAX_WORKERS, strict=False),
        OrCount(AnyWorker, MAX_WORKERS),
    ]
    """The workers, in the order of their layers. A number such as 3 starts 3 workers, or, with launcher static,
    waits for any 3."""
    plan: Annotated[tuple[PlanEntry, ...] | None, Field(min_length=1, max_length=256, strict=False), OrAuto()] = None
    """Layers of each worker. auto lets the planner choose them."""
    objective: Literal["latency", "throughput"] = "latency"
    """Goal of an automatic plan: latency makes one request fast, throughput serves many requests together."""
    groups: LargestGroup = None
    """Groups of workers that share the work of each layer, in automatic plans. auto uses groups where they are faster.
    off uses none. A number is the maximum number of workers in a group."""
    wire: Annotated[Literal["f32"], BeforeValidator(check_wire_type)] = "f32"
    """Number type of the activations that workers send to each other. f32 is exact."""
    cpu_moe: CpuMoe = None
    """Number of layers, counted from the first, whose MoE experts stay in RAM. all keeps all experts in RAM.
    auto chooses the fastest number."""
    experts_cache: Annotated[SizeOrZero | None, OrAuto()] = None
    """Maximum GPU memory, per GPU, for caching experts that stay in RAM. auto uses all free memory. 0 caches none."""
    placement: Placements = ()
    """Rules that place tensors in RAM or on GPUs, like llama.cpp's `-ot`. A tensor's first matching rule is used."""
    kv_type: Annotated[KvType, Field(strict=False)] = KvType.F16
    """Number type of keys and values in KV memory. q8_0 needs about half the memory of f16, but answers differ
    slightly. int8 is stored like q8_0, and attention uses 8-bit integers, which is faster after long prompts."""
    kv_memory: Annotated[Size | None, OrAuto()] = None
    """Maximum KV memory of each device of a worker: RAM, or a GPU. auto: room for `max_sequences` contexts if that key
    is set, else for 8,192 tokens or one longer context, at most about half of the memory that weights leave free."""
    max_sequences: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 32
    """Maximum number of sequences that are decoded together. Further sequences wait."""
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = 256
    """Maximum number of waiting sequences of one API key or client. Further requests are answered with status 429."""
    prefill_chunk: Annotated[Annotated[int, Field(ge=1, le=MAX_BATCH_TOKENS // 2)] | None, OrAuto()] = None
    """Maximum number of prompt tokens in a microbatch. auto chooses it from measured stage times."""
    prefix_cache: bool = True
    """Set false to turn off the prefix cache, which shares KV memory between prompts with the same beginning."""
    wide_tiles: bool = True
    """Set false to save memory. By default, some weights may take up to 1.4 times the memory to decode faster."""
    speculative: Annotated[Speculative | None, OrSwitch()] = Speculative()
    """Speculative decoding, which does not change answers. Give auto (use it where it is faster), off or a section."""
    allowed_hosts: tuple[str, ...] = Field(default=(), max_length=64, strict=False)
    """Host names of the API besides loopback names, hosts in `listen` and IP addresses. Warning: * allows any name."""
    allowed_origins: tuple[Origin, ...] = Field(default=(), max_length=64, strict=False)
    """Origins of web pages that may call the API, such as https://chat.example. The default allows no web page."""
    api_keys_file: FilePath | None = None
    """File with one API key per line and mode 0600. It is required unless all API addresses are loopback addresses."""
    api: Api = Api()
    """Paths, model names and request fields of the HTTP API."""
    state_dir: FilePath = Field(default_factory=lambda: environment().state_dir)
    """Folder for records and credentials. Defaults to $LLAMACLUST_STATE_DIR or ~/.local/state/llamaclust."""
    lease: Lease | None = None
    """Kubernetes Lease that decides which of several coordinators serves. The default is a lock in `state_dir`."""
    telemetry: Annotated[Telemetry | None, OrWord("otlp")] = None
    """OpenTelemetry export. Give otlp to use the OTEL_* variables, or a section. By default, nothing is exported."""
    timeouts: Timeouts = Timeouts()
    """Time limits for requests, workers and connections."""

    @property
    def launcher_facts(self) -> LauncherFacts:
        return LAUNCHERS[self.launcher]

    @property
    def awaits_any(self) -> bool:
        return isinstance(self.workers[0], AnyWorker)

    @property
    def model_name(self) -> str:
        return self.api.model_name or default_name(self.model)

    @property
    def host(self) -> str:
        return self.addresses[0][0]

    @property
    def port(self) -> int:
        return self.addresses[0][1]

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        return tuple(map(split_address, (self.listen, *self.listen_also)))

    def of_each_model(self) -> tuple[ClusterConfig, ...]:
        """Returns one configuration for each model. A key that a model sets replaces the cluster's key."""
        return tuple(map(self._of_model, self.models)) or (self,)

    def _of_model(self, entry: ModelEntry) -> ClusterConfig:
        api = self.api.model_copy(update={"model_name": entry.name, "aliases": entry.aliases})
        own = {key: value for key in _MODEL_KEYS if (value := getattr(entry, key))}
        return self.model_copy(update={"model": entry.model, "api": api, **own})

    def _places_of_models(self) -> list[tuple[tuple[str | int, ...], ClusterConfig]]:
        return [(("models", index) if self.models else (), each) for index, each in enumerate(self.of_each_model())]

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = with_named_workers(values)
        if not isinstance(models := values.get("models"), list | tuple) or not models:
            return values
        if "model" in values:
            raise PlaceError(("model",), "cannot be set with `models`; move it into `models`, or remove `models`")
        first = models[0]
        return {**values, "model": first.get("model", "") if isinstance(first, dict) else ""}

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for key, instead in _KEYS_WITHOUT_MODELS.items() if self.models else ():
            if getattr(self.api, key) != Api.model_fields[key].default:
                raise PlaceError(("api", key), f"cannot be set with `models`; {instead}")
        for key in ("max_loaded_models", "load_on_demand") if not self.models else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise PlaceError((key,), "is for several models: replace `model` by `models`")
        for key in ("adapters", "mmproj", "placement", "plan") if self.models else ():
            if getattr(self, key):
                raise PlaceError((key,), f"cannot be set with `models`; give `{key}` in the entries of `models`")
        named: set[str] = set()
        for index, config in enumerate(self.of_each_model() if self.models else ()):
            for name in (config.model_name, *config.api.aliases, *(adapter.name for adapter in config.adapters)):
                if tagged(name) in named:
                    what = f"two models or adapters are named {name!r}; give each its own name"
                    raise PlaceError(("models", index), what)
                named.add(tagged(name))
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [worker.name for worker in self.workers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlaceError(("workers", index, "name"), f"two workers are named {name!r}; give each its own name")
        for place, config in self._places_of_models() if not self.awaits_any else ():
            for index, entry in enumerate(config.plan or ()):
                for unknown in (name for name in entry.names if name not in names):
                    key = "workers" if entry.workers else "worker"
                    what = f"unknown worker {unknown!r}{hint(unknown, names)}"
                    raise PlaceError((*place, "plan", index, key), what)
            for index, rule in enumerate(config.placement):
                for pattern in rule.workers:
                    if not any(fnmatchcase(name, pattern) for name in names):
                        what = f"no worker is named {pattern!r}{hint(pattern, names)}"
                        raise PlaceError((*place, "placement", index, "workers"), what)
        return self

    @model_validator(mode="after")
    def _check_launcher(self) -> Self:
        facts = self.launcher_facts
        if not facts.uses_ray and self.ray != Ray():
            raise PlaceError(("ray",), f"is for `launcher: ray`, but `launcher` is {self.launcher}")
        if self.lease is not None and facts.is_one_program:
            raise PlaceError(("lease",), "is not for `launcher: mpi`, whose workers and coordinator are one program")
        if self.join.discover and (facts.starts_workers or self.insecure):
            raise PlaceError(
                ("join", "discover"), "needs `launcher: static` and `insecure: false`, to find the cluster by its token"
            )
        if not facts.starts_workers:
            return self
        if self.join.addresses:
            raise PlaceError(("join", "addresses"), f"is for `launcher: static`; {self.launcher} starts workers itself")
        if facts.is_local and self.join != Join():
            why = "is for `launcher: static`, `ray` or `mpi`; only processes of this machine reach local workers"
            raise PlaceError(("join",), why)
        if self.insecure:
            raise PlaceError(("insecure",), "is for `launcher: static`; other launchers give workers their token")
        if not facts.workers_outlive and self.timeouts.coordinator != Timeouts.model_fields["coordinator"].default:
            why = f"is for `launcher: static` or `ray`; {self.launcher} workers end with their coordinator"
            raise PlaceError(("timeouts", "coordinator"), why)
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        facts = self.launcher_facts
        for index, worker in enumerate(self.workers):
            given = [key for key in _STATIC_WORKER_KEYS if key in worker.model_fields_set]
            if given and not facts.starts_workers:
                options = " ".join(_as_option(worker, key) for key in given)
                why = f"in a static cluster, give this on the worker's command line: llamaclust worker ... {options}"
                raise PlaceError(("workers", index, given[0]), why)
            for key in ("gpu_layers", "gpu_memory", "cpu_moe") if facts.starts_workers else ():
                if worker.device == "cpu" and getattr(worker, key) is not None:
                    why = "is for workers with a GPU: set device to cuda:0 as well"
                    raise PlaceError(("workers", index, key), why)
            gpus = [] if worker.device == "cpu" else worker.device.split(",")
            if facts.uses_ray and set(gpus) != (own := {f"cuda:{number}" for number in range(len(gpus))}):
                why = f"Ray numbers each worker's GPUs from 0: set {','.join(sorted(own))}"
                raise PlaceError(("workers", index, "device"), why)
            if facts.is_one_program and worker.numa_node is not None:
                why = "mpirun binds workers to cores: remove this, and start mpirun with --map-by numa --bind-to numa"
                raise PlaceError(("workers", index, "numa_node"), why)
            if facts.uses_ray and worker.threads is None:
                raise PlaceError(("workers", index), "needs `threads`, since launcher ray reserves CPUs for them")
        return self

    @model_validator(mode="after")
    def _check_kv_disk(self) -> Self:
        without = next((worker for worker in self.workers if worker.kv_disk is None), None)
        for index, worker in enumerate(self.workers):
            if worker.kv_disk is None:
                continue
            if worker.device != "cpu":
                raise PlaceError(
                    ("workers", index, "kv_disk"), f"is for device cpu, but this worker has {worker.device}"
                )
            if without is not None:
                why = f"is for all workers or none, because each keeps a part of each block; {without.name} has none"
                raise PlaceError(("workers", index, "kv_disk"), why)
            if not self.prefix_cache:
                raise PlaceError(
                    ("workers", index, "kv_disk"), "needs `prefix_cache`, which is off; set `prefix_cache` to true"
                )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        with_gpu = next((worker for worker in self.workers if worker.device != "cpu"), None)
        for place, config in self._places_of_models():
            adapters = (adapter.name for adapter in config.adapters)
            names = [tagged(name) for name in (config.model_name, *config.api.aliases, *adapters)]
            for index, adapter in enumerate(config.adapters):
                if names.count(tagged(adapter.name)) > 1:
                    why = f"{adapter.name!r} is also the name of another adapter or of the model; give it its own name"
                    raise PlaceError((*place, "adapters", index, "name"), why)
            if config.adapters and with_gpu is not None:
                why = f"run on CPUs only, but worker {with_gpu.name} has {with_gpu.device}; set its device to cpu"
                raise PlaceError((*place, "adapters"), why)
        if self.api.adapter_folder is not None and with_gpu is not None:
            why = f"adapters run on CPUs only, but worker {with_gpu.name} has {with_gpu.device}; remove this key"
            raise PlaceError(("api", "adapter_folder"), why)
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        why = "can be reached from other machines: set api_keys_file as well"
        for place, (host, port) in enumerate(self.addresses if self.api_keys_file is None else ()):
            if not is_loopback(host):
                key = ("listen_also", place - 1) if place else ("listen",)
                raise PlaceError(key, f"{joined_address(host, port)} {why}")
        return self


_STATIC_WORKER_KEYS = ("device", "gpu_layers", "gpu_memory", "threads", "numa_node", "memory", "mlock", "kv_disk")
"""Keys that a static cluster's file must not set for a worker. `llamaclust worker` has options for them."""
_MODEL_KEYS = ("chat_template", "mmproj", "context_length", "kv_memory", "adapters", "placement", "plan")
_KEYS_WITHOUT_MODELS = {
    **dict.fromkeys(("model_name", "aliases"), "give `name` and `aliases` in the entries of `models`"),
    "strict_model": "a request may name any model or none, so remove this key",
    "tags": "remove this key",
    "pull": "use `llamaclust model pull`, and list each model in the cluster file",
}
"""Keys of `api` that are refused if `models` is set, with the advice for the error message."""


def _as_option(worker: WorkerConfig, key: str) -> str:
    value = getattr(worker, key)
    if key == "mlock":
        return "--mlock" if value else "without --mlock"
    if key in ("memory", "gpu_memory", "kv_disk") and value is not None:
        value = f"{value / (1 << 30):g}GiB"
    return f"--{key.replace('_', '-')} {'auto' if value is None else value}"


def cluster_document(path: Path | None, overrides: Sequence[str] = ()) -> Document:
    """Reads a cluster file and applies overrides. Does not check the values. Raises UsageError if the file cannot be
    read or an override is invalid."""
    document = _demo() if path is None else anchored(read_document(path), path.absolute().parent)
    return override(document, overrides)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Reads a cluster file (None: the demo cluster) with KEY=VALUE overrides. Raises UsageError for invalid values."""
    document = cluster_document(path, overrides)
    try:
        return ClusterConfig.model_validate(document.values)
    except ValidationError as error:
        raise UsageError(explain(error, document, _schema())) from error


_schema = cache(ClusterConfig.model_json_schema)  # Error messages use this schema.


def json_schema() -> str:
    """Returns the JSON schema that deploy/cluster.schema.json contains."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ClusterConfig.model_json_schema()}
    schema["required"].remove("model")
    schema["anyOf"] = [{"required": ["model"]}, {"required": ["models"]}]
    return json.dumps(schema, indent=2) + "\n"


def _demo() -> Document:
    values = {"name": "demo", "model": "smollm2-135m-instruct", "workers": [{"name": "a"}, {"name": "b"}]}
    values["objective"] = "throughput"  # With objective latency, the plan would use only one worker.
    return Document("the demo cluster", values, {})


if __name__ == "__main__":
    print(json_schema(), end="")
