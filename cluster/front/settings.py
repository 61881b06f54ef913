"""The HTTP API's settings, and the names by which requests address models."""

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
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """The HTTP API's settings. Clients can change only adapters and copies. Durations are in seconds."""

    listen_host: str = "127.0.0.1"
    further_hosts: tuple[str, ...] = ()  # of the other addresses
    prefix: str = ""  # of all paths, like "/llm"
    is_strict: bool = False  # refuses fields that are unknown or have no effect
    strict_model: bool | None = None  # whether a request must name the served model; None: on OpenAI's paths
    can_unload: bool = False  # the served model is one of several
    max_loaded_models: int | None = None  # of several, at once; None: as many as memory allows
    load_on_demand: bool = True  # whether requests load those of several that sleep
    aliases: tuple[str, ...] = ()  # further names of the served model
    copies: list[str] = field(default_factory=list)  # names of the served model that clients made
    tags: tuple[str, ...] = ()  # shown with it
    adapters: ServedAdapters = field(default_factory=ServedAdapters)
    rankers: tuple[str, ...] = ()  # names of the cluster's models that rank documents
    allows_pull: bool = False  # clients with the first key, where there are keys, may download models of the catalog
    adapter_folder: Path | None = None  # of adapters that clients may load
    slot_folder: Path | None = None  # that clients save slots in
    image_hosts: tuple[str, ...] = ()  # whose images are fetched, see `ImageRules`
    disabled: tuple[str, ...] = ()  # GET endpoints that are off, such as "slots"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of request fields
    recommended: Mapping[str, Any] = field(default_factory=dict)  # sampling fields by the model file
    api_keys: Sequence[str] = ()  # none: no key is asked for
    allowed_hosts: tuple[str, ...] = ()  # names beside loopback, listen_host and the address that was connected to
    allowed_origins: tuple[str, ...] = ()  # web pages that may use the API, like "https://chat.example"
    max_body_bytes: int = MAX_BODY_BYTES
    max_held_bytes: int = 128 << 20  # of the bodies of one owner's requests that have no whole reply yet; of all: twice
    max_requests: int = 512  # of one owner that have no whole reply yet; of all: twice, and as many still to come
    idle_s: float = 75.0  # a kept connection waits so long for the first byte of its next request
    head_s: float = 10.0  # from that byte, or from the start of a connection, until a request's head has arrived
    body_s: float = 30.0  # until a request's body has arrived
    keepalive_s: float = 15.0  # silence of a stream after which it gets a comment
    first_chunk_s: float = 1.0  # a stream that fails within it gets a status of its own
    unread_s: float = 60.0  # a client that takes nothing of its reply for so long has gone
    resume_s: float = 30.0  # a kept reply waits so long for its client
    background_s: float = 600.0  # likewise one that its client does not wait for, from its end on
    request_s: float = 600.0  # from its admission until a request of the journal ends unanswered
    digest: str = ""  # of the model and its settings, with which requests of the journal are computed again
    max_reply_bytes: int = 16 << 20  # of one kept reply
    max_kept_bytes: int = 256 << 20  # of all kept replies
    max_kept_replies: int = 4096

    @property
    def max_connections(self) -> int:
        """The maximum number of open connections. At the limit, a new connection replaces an idle connection."""
        return 3 * self.max_requests


def not_served(name: str, served: Iterable[str]) -> HttpError:
    message = f"model: {name[:200]!r} is not served here, only {', '.join(map(repr, served))}"
    return HttpError(404, "model_not_found", message, param="model")


class ModelNames:
    """All names of a served model: its own name, aliases, adapters, and copies that clients made in this process."""

    def __init__(self, served: str, settings: ApiSettings, *, any_by_default: bool = False) -> None:
        """`any_by_default` lets requests name any model, unless the settings' `strict_model` decides otherwise."""
        self._served = served
        self._settings = settings
        self._adapters = settings.adapters
        self._takes_any = any_by_default if settings.strict_model is None else not settings.strict_model

    @property
    def all(self) -> dict[str, str]:
        """Maps each known name to the name of the served model or of an adapter."""
        adapters, settings = self._adapters.names, self._settings
        known = (self._served, *settings.aliases, *adapters, *settings.copies)
        return dict.fromkeys(known, self._served) | {name: name for name in adapters}

    def find(self, name: str) -> str | None:
        """Returns the served model's or adapter's name that `name` stands for, or None. A tag makes no difference."""
        names = self.all
        return names.get(name) or {tagged(known): own for known, own in names.items()}.get(tagged(name))

    def adapters(
        self, name: str | None, lora: AdapterScales | None = None, default: AdapterScales = ()
    ) -> AdapterScales:
        """Returns a request's adapters: the adapter named as its model, its field `lora`, or `default`. Raises
        HttpError 404 for an unknown model, ParameterError for an unknown adapter or `lora` with an adapter as model."""
        if (number := self._adapters.number_of(self.shown(name))) is not None:
            if lora is not None:
                raise ParameterError("lora", f"model names the adapter {name!r} already: leave one of them out")
            scale = self._adapters[number].scale
            return ((number, scale),) if scale else ()
        self.check(name)
        if lora is None:
            return default
        check_adapters(lora, self._adapters.numbers)
        return tuple((adapter, scale) for adapter, scale in lora if scale)

    def shown(self, name: str | None) -> str:
        """Returns the model name to show in replies. It is the name that `name` stands for, or the served model's."""
        return (name and self.find(name)) or self._served

    def check(self, name: str | None) -> None:
        """Raises HttpError if the name is an adapter's, or another model's and not every name is accepted."""
        if self.shown(name) in self._adapters.names:
            message = f"model: {name!r} is an adapter; this endpoint uses only {self._served!r} itself"
            raise HttpError(400, "unsupported_parameter", message, param="model")
        if name is not None and not self._takes_any and self.find(name) is None:
            raise not_served(name, (self._served, *self._adapters.names))

    def check_known(self, name: str) -> None:
        if self.find(name) is None:
            raise HttpError(404, "model_not_found", f"model {name[:200]!r} not found", param="model")

    def copy(self, source: str, destination: str) -> None:
        """Adds a name for the served model. Raises HttpError if the name is invalid or fixed, there are too many
        copies, or the source is an adapter. After a restart, an adapter's lost copy could mean the model without it."""
        self.check_known(source)
        if not _NAME.fullmatch(destination):
            message = f"{destination[:200]!r} is not a valid model name: use letters, digits and ._:/@-"
            raise HttpError(400, "bad_name", message, param="destination")
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
"""The longest finite duration, in seconds. Larger values, such as Ollama's largest duration, mean for ever."""


def read_keep_alive(value: Any) -> float | None:
    """Reads seconds or a text such as "5m", or None. Negative or huge values mean infinity. Raises HttpError 400."""
    if value is None:
        return None
    seconds = _seconds(value)
    if seconds is None or not math.isfinite(seconds):
        message = f'keep_alive: {str(value)[:60]!r} is no duration; give seconds, or a text like "5m"'
        raise HttpError(400, "bad_keep_alive", message, param="keep_alive")
    return seconds if 0 <= seconds <= _MOST_S else math.inf


def _seconds(value: object) -> float | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(max(-1, min(value, _MOST_S + 1)))  # an int may be larger than any float
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
