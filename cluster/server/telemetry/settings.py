"""Reads telemetry settings from the cluster file. OpenTelemetry's environment variables replace missing keys."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from llamaclust.cluster.config.sections import Telemetry
from llamaclust.cluster.server.telemetry.trace_sampler import TraceSampler
from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import open_regular

_ENDPOINT: Final = "http://localhost:4318"
_PROTOCOL: Final = "http/protobuf"
_URL: Final = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256})=([\x20-\x7e]{0,8192})")
_MAX_HEADERS_FILE: Final = 1 << 16
_MAX_RESOURCE_CHARACTERS: Final = 255
_SAMPLERS: Final = {
    "always_on": (1.0, False),
    "always_off": (0.0, False),
    "traceidratio": (None, False),
    "parentbased_always_on": (1.0, True),
    "parentbased_always_off": (0.0, True),
    "parentbased_traceidratio": (None, True),
}
"""Maps the name of a sampler to the arguments of TraceSampler: (ratio, obeys_parent). A ratio of None is replaced by
the value of OTEL_TRACES_SAMPLER_ARG."""


@dataclass(frozen=True, slots=True)
class Target:
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # Headers may contain a secret.
    timeout_s: float = 10.0
    is_compressed: bool = True
    # PEM file with the authority that signed the collector's certificate. None for the system's authorities.
    certificate: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    traces: Target | None  # None if no spans are sent.
    metrics: Target | None
    resource: Mapping[str, str] = field(default_factory=dict)
    sampler: TraceSampler = field(default_factory=TraceSampler)
    span_delay_s: float = 5.0  # Seconds that a span may wait until it is sent together with others.
    metrics_interval_s: float = 60.0
    # Maximum number of ended requests and sequences that wait to be sent. Further ones are dropped.
    max_records: int = 2048
    max_spans: int = 512  # Maximum number of spans in a message.

    @classmethod
    def resolve(cls, section: Telemetry | None, variables: Mapping[str, str]) -> TelemetrySettings | None:
        """Returns the settings, or None if nothing is exported. Raises UsageError if a key or variable is invalid."""
        if section is None or _is_true(variables, "OTEL_SDK_DISABLED"):
            return None
        traces, metrics = (_target(section, variables, signal) for signal in ("traces", "metrics"))
        if traces is None and metrics is None:
            return None
        return cls(
            traces=traces,
            metrics=metrics,
            resource=_resource(variables),
            sampler=_sampler(section, variables),
            span_delay_s=_number(variables, "OTEL_BSP_SCHEDULE_DELAY", 5000) / 1e3,
            metrics_interval_s=_number(variables, "OTEL_METRIC_EXPORT_INTERVAL", 60_000) / 1e3,
            max_records=int(_number(variables, "OTEL_BSP_MAX_QUEUE_SIZE", 2048)),
            max_spans=int(_number(variables, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)),
        )


def _target(section: Telemetry, variables: Mapping[str, str], signal: str) -> Target | None:
    exporter = variables.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp")
    if exporter not in ("otlp", "none"):
        raise UsageError(f"OTEL_{signal.upper()}_EXPORTER={exporter} is not supported; set otlp or none")
    if exporter == "none":
        return None
    _check_supported(variables, signal)
    given = {name: _of_signal(variables, name, signal) for name in ("HEADERS", "TIMEOUT", "COMPRESSION", "CERTIFICATE")}
    compression = given["COMPRESSION"][1] or "gzip"
    if compression not in ("gzip", "none"):
        raise UsageError(f"{given['COMPRESSION'][0]}={compression} is not supported; set gzip or none")
    name, headers = given["HEADERS"]
    timeout, _ = given["TIMEOUT"]
    certificate = given["CERTIFICATE"][1] or None
    if certificate is not None and not Path(certificate).is_file():
        raise UsageError(f"{given['CERTIFICATE'][0]}={certificate}: no such file")
    return Target(
        url=_url(section, variables, signal),
        headers=_headers(name, headers) | _headers_of(section.headers_file),
        timeout_s=_number(variables, timeout, 10_000) / 1e3,
        is_compressed=compression == "gzip",
        certificate=certificate,
    )


def _check_supported(variables: Mapping[str, str], signal: str) -> None:
    name, protocol = _of_signal(variables, "PROTOCOL", signal)
    if protocol not in ("", _PROTOCOL):
        raise UsageError(f"{name}={protocol} is not supported; set {_PROTOCOL}")
    for what in ("CLIENT_KEY", "CLIENT_CERTIFICATE"):
        name, value = _of_signal(variables, what, signal)
        if value:
            raise UsageError(f"{name}: client certificates are not supported; authenticate with a header")


def _of_signal(variables: Mapping[str, str], what: str, signal: str) -> tuple[str, str]:
    own, common = f"OTEL_EXPORTER_OTLP_{signal.upper()}_{what}", f"OTEL_EXPORTER_OTLP_{what}"
    return (own, variables[own]) if own in variables else (common, variables.get(common, ""))


def _url(section: Telemetry, variables: Mapping[str, str], signal: str) -> str:
    base = section.endpoint
    if base is None:
        name, value = _of_signal(variables, "ENDPOINT", signal)
        if value and not _URL.fullmatch(value):
            raise UsageError(f"{name} must be a URL like {_ENDPOINT}, without user and password")
        # OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is a complete URL. Other settings are base URLs.
        if f"_{signal.upper()}_" in name:
            return value
        base = value or _ENDPOINT
    return f"{base.rstrip('/')}/v1/{signal}"


def _headers(name: str, value: str) -> dict[str, str]:
    pairs = [pair.strip() for pair in value.split(",") if pair.strip()]
    return dict(_header(unquote(pair), f"{name}: entry {number}") for number, pair in enumerate(pairs, 1))


def _headers_of(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_HEADERS_FILE + 1)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise UsageError(f"telemetry.headers_file: {path}: {error.strerror}") from error
    if len(data) > _MAX_HEADERS_FILE:
        raise UsageError(f"telemetry.headers_file: {path}: the file has more than {_MAX_HEADERS_FILE} bytes")
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"telemetry.headers_file: {path}: the file is not ASCII text") from error
    if mode & 0o077:
        raise UsageError(f"{path}: other users can read these headers (mode {mode:04o}); run: chmod 600 {path}")
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return dict(_header(line, f"{path}: line {number}") for number, line in numbered if line and line[0] != "#")


def _header(pair: str, place: str) -> tuple[str, str]:
    found = _HEADER.fullmatch(pair)
    if found is None:
        raise UsageError(f"{place} must be a header NAME=VALUE in ASCII characters")
    return found[1].lower(), found[2].strip()


def _sampler(section: Telemetry, variables: Mapping[str, str]) -> TraceSampler:
    if section.sample_ratio is not None:
        return TraceSampler(section.sample_ratio)
    name = variables.get("OTEL_TRACES_SAMPLER", "parentbased_always_on")
    if name not in _SAMPLERS:
        raise UsageError(f"OTEL_TRACES_SAMPLER={name} is not supported; set one of {', '.join(_SAMPLERS)}")
    ratio, obeys_parent = _SAMPLERS[name]
    if ratio is None:
        ratio = _number(variables, "OTEL_TRACES_SAMPLER_ARG", 1.0, least=0.0, most=1.0)
    return TraceSampler(ratio, obeys_parent)


def _resource(variables: Mapping[str, str]) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in variables.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",") if pair.strip()]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise UsageError("OTEL_RESOURCE_ATTRIBUTES must be a list of NAME=VALUE, separated by commas")
    given = {name.strip(): unquote(value.strip())[:_MAX_RESOURCE_CHARACTERS] for name, _, value in pairs}
    service = variables.get("OTEL_SERVICE_NAME") or given.get("service.name", "llamaclust")
    return {**given, "service.name": service}


def _is_true(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() == "true"


def _number(variables: Mapping[str, str], name: str, default: float, *, least: float = 1.0, most: float = 1e9) -> float:
    try:
        number = float(variables.get(name, default))
    except ValueError as error:
        raise UsageError(f"{name}={variables[name]} is not a number") from error
    if not least <= number <= most:
        raise UsageError(f"{name}={number:g} is out of range; set a value from {least:g} to {most:g}")
    return number
