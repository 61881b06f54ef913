"""Settings of the HTTP API, and the names by which requests address models."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llamaclust.cluster.config.values import TAG, tagged
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.cluster.state.adapters import ServedAdapters
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_BODY_BYTES, AdapterScales

MAX_COPIES: Final = 64
KEPT_REPLIES: Final = 4096
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Settings of the HTTP API. Requests can change only `adapters` and `copies`. Durations are in seconds."""

    listen_host: str = "127.0.0.1"
    further_hosts: tuple[str, ...] = ()  # Hosts on which the API listens besides `listen_host`.
    prefix: str = ""  # Prefix of all paths, such as "/llm".
    is_strict: bool = False  # True to refuse fields that are unknown or have no effect.
    strict_model: bool | None = None  # True if requests must name a served model. None: only on OpenAI's paths.
    can_unload: bool = False  # True if the cluster file has `models`, which can be unloaded.
    max_loaded_models: int | None = None  # Maximum number of models loaded at once. None: as many as memory allows.
    load_on_demand: bool = True  # True if requests load models that are unloaded.
    aliases: tuple[str, ...] = ()  # Additional names of the served model.
    copies: list[str] = field(default_factory=list)  # Names that clients gave the served model.
    tags: tuple[str, ...] = ()  # Tags shown with the model.
    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    rankers: tuple[str, ...] = ()  # Names of the cluster's models that rank documents.
    # True if clients may download models of the catalog. If there are API keys, only the first one allows it.
    allows_pull: bool = False
    adapter_folder: Path | None = None  # Folder of adapters that clients may load.
    slot_folder: Path | None = None  # Folder in which clients save slots.
    image_hosts: tuple[str, ...] = ()  # Hosts whose images are fetched. See `ImageRules`.
    disabled: tuple[str, ...] = ()  # GET endpoints that are switched off, such as "slots".
    defaults: Mapping[str, Any] = field(default_factory=dict)  # Default values of request fields.
    recommended: Mapping[str, Any] = field(default_factory=dict)  # Sampling fields that the model file recommends.
    api_keys: Sequence[str] = ()  # Empty if clients need no key.
    # Accepted host names besides loopback, `listen_host` and the connected address.
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()  # Origins of web pages that may use the API, such as "https://chat.example".
    max_body_bytes: int = MAX_BODY_BYTES
    # Maximum bytes of the bodies of one owner's open requests. The limit for all owners together is twice as high.
    max_held_bytes: int = 128 << 20
    # Maximum number of one owner's open requests with a complete body. The limit for all owners together is twice as
    # high. In addition, `max_requests` requests of all owners may wait for the rest of their bodies.
    max_requests: int = 512
    idle_s: float = 75.0  # Maximum wait of a kept connection for the first byte of its next request.
    # Maximum time until the head of a request has arrived, from its first byte or the start of the connection.
    head_s: float = 10.0
    body_s: float = 30.0  # Maximum time until the body of a request has arrived.
    keepalive_s: float = 15.0  # Time without an event after which a stream gets a comment.
    # Time for preparing a request, such as its images, after which a stream begins with comments.
    prepare_s: float = 10.0
    first_chunk_s: float = 1.0  # A stream that fails within this time gets an HTTP error status.
    unread_s: float = 60.0  # A client that accepts no data for this time is disconnected.
    resume_s: float = 30.0  # Time for which a kept reply waits for a client.
    background_s: float = 600.0  # Time for which a background reply is kept after its end.
    # Maximum time from the admission of a journalled request to its answer. Afterwards, the request fails.
    request_s: float = 600.0
    digest: str = ""  # Digest of the model and its settings. Journalled requests continue only with the same digest.
    max_reply_bytes: int = 16 << 20  # Maximum bytes of one kept reply.
    max_kept_bytes: int = 256 << 20  # Maximum bytes of one client's kept replies. All clients together: twice as many.
    max_kept_replies: int = KEPT_REPLIES

    @property
    def max_connections(self) -> int:
        """Maximum number of open connections. At the limit, a new connection replaces an idle one."""
        return 3 * self.max_requests


def not_served(name: str, served: Iterable[str]) -> HttpError:
    others = ", ".join(map(repr, served))
    message = f"model: {name[:200]!r} is not served here" + (f", only {others}" if others else "")
    return HttpError(404, "model_not_found", message, param="model")


class ModelNames:
    """All names of a served model: its own name, its aliases, its adapters, and copies that clients made."""

    def __init__(self, served: str, settings: ApiSettings, *, any_by_default: bool = False) -> None:
        """`any_by_default` is true if requests may name any model. The setting `strict_model` overrides it."""
        self._served = served
        self._settings = settings
        self._adapters = settings.adapters
        self._takes_any = any_by_default if settings.strict_model is None else not settings.strict_model

    @property
    def all(self) -> dict[str, str]:
        adapters, settings = self._adapters.names, self._settings
        known = (self._served, *settings.aliases, *adapters, *settings.copies)
        return dict.fromkeys(known, self._served) | {name: name for name in adapters}

    def find(self, name: str) -> str | None:
        """Returns the name of the model or adapter to which `name` refers, or None. A missing tag means `:latest`."""
        names = self.all
        return names.get(name) or {tagged(known): own for known, own in names.items()}.get(tagged(name))

    def adapters(
        self, name: str | None, lora: AdapterScales | None = None, default: AdapterScales = ()
    ) -> AdapterScales:
        """Returns a request's adapters: the adapter called `name` (the field `model`), else `lora`, else `default`.
        Raises HttpError (404) for an unknown model, and ParameterError for an unknown adapter."""
        if (number := self._adapters.number_of(self.shown(name))) is not None:
            if lora is not None:
                raise ParameterError("lora", f"the field 'model' names adapter {name!r}; send only one of the two")
            scale = self._adapters[number].scale
            return ((number, scale),) if scale else ()
        self.check(name)
        if lora is None:
            return default
        check_adapters(lora, self._adapters.numbers)
        return tuple((adapter, scale) for adapter, scale in lora if scale)

    def shown(self, name: str | None) -> str:
        return (name and self.find(name)) or self._served

    def check(self, name: str | None) -> None:
        """Raises HttpError if `name` is an adapter, or if it is unknown and the settings refuse unknown names."""
        if self.shown(name) in self._adapters.names:
            message = f"model: {name!r} is an adapter; this endpoint uses no adapters: request {self._served!r}"
            raise HttpError(400, "unsupported_parameter", message, param="model")
        if name is not None and not self._takes_any and self.find(name) is None:
            raise not_served(name, (self._served, *self._adapters.names))

    def check_known(self, name: str) -> None:
        if self.find(name) is None:
            raise HttpError(404, "model_not_found", f"model {name[:200]!r} not found", param="model")

    def copy(self, source: str, destination: str) -> None:
        """Adds a name for the served model. Raises HttpError if a name is invalid or not allowed."""
        self.check_known(source)
        if not _NAME.fullmatch(destination):
            message = f"{destination[:200]!r} is not a valid model name: use letters, digits and ._:/@-"
            raise HttpError(400, "bad_name", message, param="destination")
        # A restart deletes copies. Requests for a copy of an adapter could then get the model without the adapter.
        for name in map(self.find, (source, destination)):
            if name in self._adapters.names:
                message = f"{name!r} is an adapter: give adapters their names under `adapters` in the cluster file"
                raise HttpError(403, "names_are_fixed", message)
        if self.find(destination) is not None:
            return
        name = destination.removesuffix(TAG)
        if self._settings.strict_model:
            message = f"names are fixed here: add {name!r} to api.aliases in the cluster file"
            raise HttpError(403, "names_are_fixed", message)
        if len(self._settings.copies) >= MAX_COPIES:
            raise HttpError(507, "too_many_names", f"there are {MAX_COPIES} copies already; delete one")
        self._settings.copies.append(name)

    def delete(self, name: str) -> None:
        """Removes a copy. Raises HttpError if the name is unknown, or is the model's own name or an alias."""
        self.check_known(name)
        plain = name.removesuffix(TAG)
        if plain not in self._settings.copies:
            message = f"{name[:200]!r} is served: remove it with `llamaclust model rm` once the cluster is stopped"
            raise HttpError(403, "model_in_use", message, param="model")
        self._settings.copies.remove(plain)


_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"\d{1,12}(?:\.\d{0,9})?(?:ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"(-?)((?:{_PART})+)")
_MOST_S = 1_000_000_000
"""Maximum finite duration in seconds. Larger values, such as Ollama's largest duration, mean an unlimited time."""


def read_keep_alive(value: Any) -> float | None:
    """Reads seconds, a text such as "5m", or None. Negative or huge values mean infinity. Raises HttpError (400)."""
    if value is None:
        return None
    seconds = _seconds(value)
    if seconds is None or not math.isfinite(seconds):
        message = f'keep_alive: {str(value)[:60]!r} is not a duration; give seconds, or a text like "5m"'
        raise HttpError(400, "bad_keep_alive", message, param="keep_alive")
    return seconds if 0 <= seconds <= _MOST_S else math.inf


def _seconds(value: object) -> float | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(max(-1, min(value, _MOST_S + 1)))  # An int may exceed the range of a float.
    if isinstance(value, float):
        return value
    if not isinstance(value, str) or len(value) > 64:
        return None
    if re.fullmatch(r"-?\d{1,12}", value):
        return float(value)
    if (match := _DURATION.fullmatch(value)) is None:
        return None
    parts = re.findall(r"([\d.]+)(\D+)", match[2])
    return (-1 if match[1] else 1) * sum(float(number) * _UNITS_S[unit] for number, unit in parts)
