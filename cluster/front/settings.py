"""Settings of the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamaclust.cluster.state.adapters import ServedAdapters


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Fixed for the life of an app, but for its adapters and copies. Durations are in seconds."""

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
    disabled: tuple[str, ...] = ()  # GET endpoints that are off, such as "slots"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of request fields
    recommended: Mapping[str, Any] = field(default_factory=dict)  # sampling fields by the model file
    api_keys: Sequence[str] = ()  # none: no key is asked for
    allowed_hosts: tuple[str, ...] = ()  # names beside loopback, listen_host and the address that was connected to
    allowed_origins: tuple[str, ...] = ()  # web pages that may use the API, like "https://chat.example"
    max_body_bytes: int = 16 << 20
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
        """Open at once; idle ones give their places to others."""
        return 3 * self.max_requests
