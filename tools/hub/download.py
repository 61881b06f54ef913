"""Fetches one file over HTTP into a partial file that survives interruptions: resumes, retries, never runs for ever."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from llamaclust.core.errors import DownloadError
from llamaclust.tools.hub.download_ranges import RangeSource

Progress = Callable[[str, int, int | None], None]
"""Called with the step, the bytes done and the total (None: unknown)."""

_COUNT = re.compile("[0-9]{1,18}")
_DISK_RESERVE_BYTES = 1 << 26
_LARGE_BYTES = 1 << 26
"""From here on several connections are worth their set-up."""
_RETRY_STATUSES = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a download may take: tries without any progress, seconds before the first and longest pause between
    tries, seconds in all."""

    tries: int = 6
    first_pause_s: float = 0.5
    longest_pause_s: float = 15.0
    deadline_s: float = 6 * 3600.0


class _TryAgain(Exception):
    """A failure that may pass: a lost connection, a busy server."""


@dataclass(slots=True)
class _Partial:
    """The bytes that are here already, and what the server said of the file they belong to."""

    path: Path
    url: str
    headers: dict[str, str]

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self) -> str | None:
        """The ETag or date to resume with; without one, a partial file cannot be trusted to be of the same file."""
        try:
            said = json.loads(self.note.read_text(encoding="utf-8"))
            return str(said["validator"]) if said["url"] == self.url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember(self, response: httpx.Response) -> None:
        etag = response.headers.get("etag", "")
        validator = etag if etag.startswith('"') else response.headers.get("last-modified")
        if validator is None:
            self.note.unlink(missing_ok=True)
        else:
            self.note.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Download:
    """A file to fetch, and what its bytes must be."""

    url: str
    sha256: str | None  # checked at the end; None: unknown
    headers: Mapping[str, str] = field(default_factory=dict)  # sent to that server only
    room_bytes: int = 0  # to stay free on the disk beyond the file itself


def fetch(
    client: httpx.Client, wanted: Download, partial: Path, progress: Progress, patience: Patience | None = None
) -> None:
    """Downloads a file into `partial`, resuming an earlier attempt. A large file uses several connections where the
    server supports ranges.

    DownloadError if the server refuses, the disk is too small, `patience` ends or the hash is wrong; a file with a
    wrong hash is deleted, an incomplete one stays for the next attempt.
    """
    state = _Partial(partial, wanted.url, dict(wanted.headers))
    resumed = state.size_bytes > 0
    checked = wanted.sha256 is not None
    _fetch_with_patience(client, state, progress, checked, wanted.room_bytes, patience or Patience())
    if not checked or hash_of(partial) == wanted.sha256:
        return
    state.forget()
    if not resumed:
        raise DownloadError(f"{wanted.url}: wrong SHA-256, {wanted.sha256} expected; deleted, check the address")
    progress("the resumed file has a wrong hash, starting anew", 0, None)
    fetch(client, wanted, partial, progress, patience)


def hash_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_room(directory: Path, needed_bytes: int, what: str) -> None:
    """DownloadError where the disk has not `needed_bytes` and a reserve."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + _DISK_RESERVE_BYTES:
        needed = (needed_bytes + _DISK_RESERVE_BYTES) >> 20
        raise DownloadError(f"{what} needs {needed} MiB on the disk of {directory}, {free >> 20} MiB are free")


def _fetch_with_patience(
    client: httpx.Client, state: _Partial, progress: Progress, checked: bool, room_bytes: int, patience: Patience
) -> None:
    deadline = time.monotonic() + patience.deadline_s
    failures, best = 0, state.size_bytes
    while True:
        try:
            return _fetch_once(client, state, progress, checked, room_bytes, deadline)
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise DownloadError(f"{state.url}: {error}") from error
        except (_TryAgain, httpx.TransportError) as error:
            failures = 1 if state.size_bytes > best else failures + 1
            best = max(best, state.size_bytes)
            pause = min(patience.first_pause_s * 2 ** (failures - 1), patience.longest_pause_s)
            if failures >= patience.tries or time.monotonic() + pause > deadline:
                raise DownloadError(
                    f"{state.url}: {error or type(error).__name__} ({failures} tries without progress, {best} bytes "
                    "are kept); run the same command again to go on"
                ) from error
            time.sleep(pause)


def _fetch_once(
    client: httpx.Client, state: _Partial, progress: Progress, checked: bool, room_bytes: int, deadline: float
) -> None:
    headers = _resume_headers(state, checked)
    with client.stream("GET", state.url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if response.headers.get("content-range") == f"bytes */{state.size_bytes}":
                return None
            state.forget()
            raise _TryAgain("the server has fewer bytes than were kept")
        _check_status(response, state.url)
        start = _start_of(response)
        if start not in (0, state.size_bytes):
            state.forget()
            raise _TryAgain(f"the server answered from byte {start}")
        total = _total_bytes(response, start)
        check_room(state.path.parent, room_bytes + max(0, (total or 0) - state.size_bytes), state.url)
        state.remember(response)
        if total is None or not _is_for_ranges(response, state, total - start, checked):
            return _append(response, state, start, total, progress, deadline)
    return _append_ranges(client, state, start, total, progress, deadline)


def _resume_headers(state: _Partial, checked: bool) -> dict[str, str]:
    """A range where the bytes already here are known to be of the same file, or are checked afterwards."""
    headers = {**state.headers, "Accept-Encoding": "identity"}
    validator = state.validator()
    if state.size_bytes and (validator or checked):
        headers["Range"] = f"bytes={state.size_bytes}-"
        if validator:
            headers["If-Range"] = validator
    return headers


def _check_status(response: httpx.Response, url: str) -> None:
    if response.status_code in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        if response.headers.get("content-encoding", "identity") != "identity":
            raise DownloadError(f"{url}: the server sent compressed bytes that were not requested")
        if url.startswith("https:") and response.url.scheme != "https":
            raise DownloadError(f"{url}: redirected to an address without TLS, {response.url}")
        return
    message = f"{url}: the server answered {response.status_code} {response.reason_phrase}".rstrip()
    raise _TryAgain(message) if response.status_code in _RETRY_STATUSES else DownloadError(message)


def _start_of(response: httpx.Response) -> int:
    if response.status_code == httpx.codes.OK:
        return 0
    text = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    return int(text) if _COUNT.fullmatch(text) else -1


def _total_bytes(response: httpx.Response, start: int) -> int | None:
    length = response.headers.get("content-length", "")
    return start + int(length) if _COUNT.fullmatch(length) else None


def _append(
    response: httpx.Response, state: _Partial, start: int, total: int | None, progress: Progress, deadline: float
) -> None:
    done, unchecked = start, 0
    with state.path.open("r+b" if start else "wb") as file:
        file.seek(start)
        for chunk in response.iter_raw():
            file.write(chunk)
            done, unchecked = done + len(chunk), unchecked + len(chunk)
            progress("downloading", done, total)
            if time.monotonic() > deadline:
                raise _TryAgain("the time for this download is over")
            if total is None and unchecked > _DISK_RESERVE_BYTES // 2:
                check_room(state.path.parent, 0, state.url)
                unchecked = 0
    if total is not None and done != total:
        raise _TryAgain(f"{total - done} bytes are missing")


def _is_for_ranges(response: httpx.Response, state: _Partial, rest: int, checked: bool) -> bool:
    """Whether the rest is worth several connections, and its pieces are known to be of the same file."""
    gives = response.status_code == httpx.codes.PARTIAL_CONTENT or response.headers.get("accept-ranges") == "bytes"
    return rest >= _LARGE_BYTES and gives and (checked or state.validator() is not None)


def _append_ranges(
    client: httpx.Client, state: _Partial, start: int, total: int, progress: Progress, deadline: float
) -> None:
    headers = {**state.headers, "Accept-Encoding": "identity"}
    if validator := state.validator():
        headers["If-Range"] = validator
    done = start
    with state.path.open("r+b" if start else "wb") as file:
        file.seek(start)
        for piece in RangeSource(client, state.url, headers, deadline).pieces(start, total):
            file.write(piece.data)
            file.flush()
            done += len(piece.data)
            progress("downloading", done, total)
            if piece.failure is not None:
                raise _TryAgain(piece.failure)
