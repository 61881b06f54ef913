"""Reads the environment variables that configure this program. Other modules may only set or pass on variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamaclust.cluster.config.values import expand_home, parse_size
from llamaclust.core.errors import UsageError
from llamaclust.core.logs import LogFormat

_X86_LEVELS = ("avx2", "avxvnni", "avx512", "avx512vnni", "amx", "avx512vbmi")
_ARM_LEVELS = ("neon", "neon_dotprod", "neon_i8mm")
FEATURE_LEVELS = ("generic", *_X86_LEVELS, *_ARM_LEVELS)
_HUB = "https://huggingface.co"
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_TRUST_VARIABLES = ("SSLKEYLOGFILE", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True, slots=True)
class Environment:
    """Values of the LLAMACLUST_* variables. An empty variable counts as not set."""

    state_dir: Path  # LLAMACLUST_STATE_DIR. Default: $XDG_STATE_HOME/llamaclust or ~/.local/state/llamaclust.
    home: Path  # LLAMACLUST_HOME, with models and caches. Default: $XDG_CACHE_HOME/llamaclust or ~/.cache/llamaclust.
    packed_cache_bytes: int  # LLAMACLUST_CACHE_SIZE, the maximum bytes of the cache of packed weights. 0: no cache.
    # LLAMACLUST_WEIGHTS_SIZE, the maximum bytes of weights fetched from other workers. 0: neither fetches nor serves.
    weights_bytes: int
    # LLAMACLUST_FEATURE_LEVEL, the instruction set of the kernels. None chooses the best one.
    feature_level: str | None
    log_format: LogFormat  # LLAMACLUST_LOG, the format of log lines.
    has_colors: bool = True  # False if NO_COLOR is set or the terminal has no colors.
    join: tuple[str, ...] = ()  # LLAMACLUST_JOIN, the coordinators that a worker joins, as HOST:PORT,HOST:PORT.

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def packed_cache_dir(self) -> Path:
        return self.home / "packed"

    @property
    def weights_dir(self) -> Path:
        return self.home / "weights"

    @property
    def kv_disk_dir(self) -> Path:
        return self.home / "kv"

    @property
    def kernels_dir(self) -> Path:
        return self.home / "kernels"


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Reads the LLAMACLUST_* variables (default: those of this process). Raises UsageError if a value is invalid."""
    variables = os.environ if variables is None else variables
    level = variables.get("LLAMACLUST_FEATURE_LEVEL") or None
    if level is not None and level not in FEATURE_LEVELS:
        raise UsageError(f"LLAMACLUST_FEATURE_LEVEL={level} is not supported; set one of {', '.join(FEATURE_LEVELS)}")
    form = variables.get("LLAMACLUST_LOG") or LogFormat.TEXT
    if form not in set(LogFormat):
        raise UsageError(f"LLAMACLUST_LOG={form} is not supported; set one of {', '.join(LogFormat)}")
    return Environment(
        state_dir=_folder(variables, "LLAMACLUST_STATE_DIR", "XDG_STATE_HOME", "~/.local/state"),
        home=_folder(variables, "LLAMACLUST_HOME", "XDG_CACHE_HOME", "~/.cache"),
        packed_cache_bytes=_size(variables, "LLAMACLUST_CACHE_SIZE", default="32GiB"),
        weights_bytes=_size(variables, "LLAMACLUST_WEIGHTS_SIZE", default="64GiB"),
        feature_level=level,
        log_format=LogFormat(form),
        has_colors=not variables.get("NO_COLOR") and variables.get("TERM") not in (None, "", "dumb"),
        join=tuple(filter(None, (variables.get("LLAMACLUST_JOIN") or "").split(","))),
    )


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Values of the HF_* variables, which Hugging Face's own programs use too."""

    endpoint: str  # HF_ENDPOINT, the address of the hub or of a mirror, without a slash at the end.
    token: str | None  # HF_TOKEN.
    token_file: Path  # HF_TOKEN_PATH. Default: the file `token` in $HF_HOME or ~/.cache/huggingface.
    token_file_named: bool


def hub_settings(variables: Mapping[str, str] | None = None) -> HubSettings:
    variables = os.environ if variables is None else variables
    endpoint = (variables.get("HF_ENDPOINT") or _HUB).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint):
        raise UsageError(f"HF_ENDPOINT={endpoint} is not an address like {_HUB}")
    named = variables.get("HF_TOKEN_PATH")
    try:
        file = expand_home(named) if named else expand_home(variables.get("HF_HOME") or "~/.cache/huggingface")
    except ValueError as error:
        raise UsageError(f"{'HF_TOKEN_PATH' if named else 'HF_HOME'}={error}") from error
    path = Path(file) if named else Path(file) / "token"
    return HubSettings(endpoint, variables.get("HF_TOKEN") or None, path, bool(named))


def proxy_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the proxy variables that are not empty. If both exist, http_proxy takes precedence over HTTP_PROXY."""
    variables = os.environ if variables is None else variables
    by_effect = {name.lower(): name for name in sorted(variables) if name.lower() in _PROXY_VARIABLES}
    return {name: variables[name] for name in by_effect.values() if variables[name]}


def trust_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the variables that change which certificates OpenSSL and httpx trust."""
    variables = os.environ if variables is None else variables
    return {name: variables[name] for name in _TRUST_VARIABLES if variables.get(name)}


def otel_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    variables = os.environ if variables is None else variables
    return {name: value.strip() for name, value in variables.items() if name.startswith("OTEL_") and value.strip()}


def _size(variables: Mapping[str, str], name: str, default: str) -> int:
    given = variables.get(name) or default
    try:
        return 0 if given == "0" else parse_size(given)
    except ValueError as error:
        raise UsageError(f"{name}={error}, or 0 for none") from error


def _folder(variables: Mapping[str, str], own: str, base: str, default: str) -> Path:
    name = own if variables.get(own) else base
    given = variables.get(name)
    try:
        folder = Path(expand_home(given or default))
    except ValueError as error:
        if not given:
            raise UsageError(f"this user has no home directory, and HOME is not set; set {own} to a folder") from None
        raise UsageError(f"{name}={error}") from error
    return folder if name == own else folder / "llamaclust"
