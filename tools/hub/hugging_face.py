"""Finds files on the Hugging Face hub or a mirror: their names, and a file's size and hash before its download."""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpx

from llamaclust.cluster.config.environment import HubSettings
from llamaclust.cluster.config.model_sources import HubFile
from llamaclust.core.addresses import is_loopback
from llamaclust.core.errors import DownloadError, UsageError
from llamaclust.core.regular_file import decode_text
from llamaclust.tools.hub.download import RETRY_STATUSES, DownloadLimits, byte_count
from llamaclust.tools.hub.web_client import failure

_SHA256: Final = re.compile(r'(?:W/)?"?([0-9a-f]{64})"?')
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_TOKEN: Final = re.compile(r"[!-~]{1,512}")
_REDIRECTS: Final = 5
_LISTING_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """The address of a file, with its hash and size if known. `headers` may be sent only to the server of `url`."""

    url: str
    sha256: str | None = None
    size_bytes: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def find_on_hub(client: httpx.Client, settings: HubSettings, source: HubFile, limits: DownloadLimits) -> RemoteFile:
    """Requests the file's size and SHA-256 from the hub. Raises DownloadError if the hub refuses, and UsageError if the
    access token cannot be used."""
    headers = _headers(settings)
    url = source.url(settings.endpoint)
    response = _head(client, url, headers, limits)
    if response.status_code >= 400:
        raise DownloadError(_refusal(response, source, "Authorization" in headers))
    fields = response.headers
    digest = _SHA256.fullmatch(fields.get("x-linked-etag") or fields.get("etag", ""))
    size = fields.get("x-linked-size") or ("" if response.is_redirect else fields.get("content-length", ""))
    commit = fields.get("x-repo-commit", "")
    pinned = source.url(settings.endpoint, commit) if _COMMIT.fullmatch(commit) else url
    return RemoteFile(pinned, digest[1] if digest else None, byte_count(size), headers)


def files_on_hub(client: httpx.Client, settings: HubSettings, source: HubFile) -> list[str]:
    """Returns the paths of all files in the repository of `source`. Raises DownloadError if the hub does not list the
    files, and UsageError if the access token cannot be used."""
    url, headers, body = source.repository_url(settings.endpoint), _headers(settings), bytearray()
    try:
        with client.stream("GET", url, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise DownloadError(_refusal(response, source, "Authorization" in headers))
            for data in response.iter_bytes():
                body += data
                if len(body) > _LISTING_BYTES:
                    raise DownloadError(f"{url}: the list of files exceeds {_LISTING_BYTES >> 20} MiB")
        return [file["rfilename"] for file in json.loads(body)["siblings"] if isinstance(file["rfilename"], str)]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadError(f"{url}: {failure(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DownloadError(f"{url}: the answer is not a list of files") from error


def _headers(settings: HubSettings) -> dict[str, str]:
    token = settings.token or _token_of_file(settings)
    if token is None:
        return {}
    if not _TOKEN.fullmatch(token):
        raise UsageError("HF_TOKEN: must be 1 to 512 printable ASCII characters, without spaces")
    parts = urlsplit(settings.endpoint)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise UsageError(f"HF_ENDPOINT is {settings.endpoint}, but a token is sent to https addresses only")
    return {"Authorization": f"Bearer {token}"}


def _token_of_file(settings: HubSettings) -> str | None:
    path = settings.token_file
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = decode_text(path.read_bytes()).strip()
    except FileNotFoundError as error:
        if settings.token_file_named:
            raise UsageError(f"HF_TOKEN_PATH={path}: no such file") from error
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the token cannot be read: {error}") from error
    if mode & 0o077:
        raise UsageError(f"{path}: other users may read this token (mode {mode:04o}): chmod 600 {path}")
    return token or None


def _head(client: httpx.Client, url: str, headers: Mapping[str, str], limits: DownloadLimits) -> httpx.Response:
    """Returns the hub's reply. Follows redirects within the hub (for renamed repositories), but no others."""
    place = url
    for failures in range(limits.tries):
        tries_left = limits.tries - failures - 1
        try:
            for _ in range(_REDIRECTS):
                response = client.head(
                    place, headers={**headers, "Accept-Encoding": "identity"}, follow_redirects=False
                )
                target = _target(place, response)
                is_away = not response.is_redirect or _origin(target) != _origin(url)
                if is_away or "x-linked-etag" in response.headers:
                    break
                place = target
            if response.status_code not in RETRY_STATUSES or not tries_left:
                return response
        except (httpx.TransportError, httpx.InvalidURL) as error:
            if not tries_left or isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
                raise DownloadError(f"{url}: {failure(error)}") from error
        time.sleep(limits.backoff.pause_s(failures))
    raise AssertionError("the last try returns or raises")


def _target(place: str, response: httpx.Response) -> str:
    try:
        return urljoin(place, str(response.headers.get("location", "")))
    except ValueError:
        return ""


def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        return None  # The redirect has no valid address.


def _refusal(response: httpx.Response, source: HubFile, has_token: bool) -> str:
    token = "the token may not read it" if has_token else "give a token in HF_TOKEN"
    match response.headers.get("x-error-code"):
        case "EntryNotFound":
            return f"{source}: the repository has no such file at revision {source.revision}"
        case "RevisionNotFound":
            return f"{source}: the repository has no revision {source.revision}"
        case "GatedRepo":
            return f"{source}: accept the repository's conditions on its page first; then {token}"
        case "RepoNotFound":
            return f"{source}: no such repository, or a private one: {token}"
    if response.status_code in (401, 403):
        return f"{source}: the hub answered {response.status_code}: {token}"
    return f"{source}: the hub answered {response.status_code} {response.reason_phrase}".rstrip()
