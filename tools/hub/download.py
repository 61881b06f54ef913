"""Downloads one file over HTTP into a partial file. A download can be resumed, is retried, and has a deadline."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx

from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import DownloadError
from llamaclust.tools.hub.web_client import failure
from llamaclust.tools.progress import Progress

_COUNT = re.compile("[0-9]{1,18}")
_DISK_RESERVE_BYTES = 1 << 26
_LARGE_BYTES = 1 << 26
"""Several connections are used if at least this many bytes are missing."""
_CONNECTIONS = 4
_PIECE_BYTES = 8 << 20
_AHEAD = 6
"""Maximum number of pieces in memory or in transfer. It exceeds _CONNECTIONS, so that a slow piece blocks no other."""
RETRY_STATUSES = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """Limits of a download: number of attempts without progress, pauses between attempts, and total time."""

    tries: int = 6
    first_pause_s: float = 0.5
    longest_pause_s: float = 15.0
    deadline_s: float = 6 * 3600.0

    @property
    def backoff(self) -> Backoff:
        return Backoff(self.first_pause_s, self.longest_pause_s)


DOWNLOAD_LIMITS = DownloadLimits()


class _TryAgain(Exception):
    """A failure after which another attempt may succeed, such as a lost connection or a busy server."""


@dataclass(frozen=True, slots=True)
class Download:
    url: str
    sha256: str | None  # Checked at the end. None if the hash is unknown.
    headers: Mapping[str, str] = field(default_factory=dict)  # Headers for the server of `url` only.
    room_bytes: int = 0  # Bytes that must stay free on the disk in addition to the file.


def fetch(
    client: httpx.Client, wanted: Download, partial: Path, progress: Progress, limits: DownloadLimits = DOWNLOAD_LIMITS
) -> None:
    """Downloads a file into `partial`, or resumes an earlier download. Raises DownloadError if the server refuses, the
    disk lacks space, a limit is reached or the hash is wrong. An incomplete file is kept."""
    transfer = _Transfer(client, wanted, partial, progress, time.monotonic() + limits.deadline_s)
    resumed = transfer.size_bytes > 0
    transfer.run(limits)
    if wanted.sha256 is None or hash_of(partial) == wanted.sha256:
        return
    transfer.forget()
    if not resumed:
        raise DownloadError(
            f"{wanted.url}: the SHA-256 is not {wanted.sha256}; the download is deleted, check the address"
        )
    progress("the resumed file has a wrong hash, downloading it again", 0, None)
    fetch(client, wanted, partial, progress, limits)


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def byte_count(text: str) -> int | None:
    return int(text) if _COUNT.fullmatch(text) else None


def check_room(directory: Path, needed_bytes: int, what: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + _DISK_RESERVE_BYTES:
        needed = (needed_bytes + _DISK_RESERVE_BYTES) >> 20
        raise DownloadError(f"{what} needs {needed} MiB on the disk of {directory}, but {free >> 20} MiB are free")


@dataclass(frozen=True, slots=True)
class Piece:
    data: bytes
    failure: str | None


@dataclass(frozen=True, slots=True)
class RangeSource:
    """A large file whose ranges are requested over several connections."""

    client: httpx.Client
    url: str
    headers: Mapping[str, str]
    deadline: float  # A value of time.monotonic().

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yields the bytes [start, end) as consecutive pieces. Stops after a piece whose `failure` is not None."""
        stop = Event()
        ranges = iter([(at, min(at + _PIECE_BYTES, end)) for at in range(start, end, _PIECE_BYTES)])
        with ThreadPoolExecutor(_CONNECTIONS, "download") as pool:
            waiting: deque[Future[Piece]] = deque()
            try:
                while True:
                    for first, last in ranges:
                        waiting.append(pool.submit(self._piece, first, last, stop))
                        if len(waiting) == _AHEAD:
                            break
                    if not waiting:
                        return
                    yield (piece := waiting.popleft().result())
                    if piece.failure is not None:
                        return
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _piece(self, start: int, end: int, stop: Event) -> Piece:
        data = bytearray()
        headers = {**self.headers, "Range": f"bytes={start}-{end - 1}"}
        try:
            with self.client.stream("GET", self.url, headers=headers) as response:
                wanted = f"bytes {start}-{end - 1}/"
                if response.status_code != httpx.codes.PARTIAL_CONTENT:
                    return Piece(b"", f"the server answered {response.status_code} for a range")
                if not response.headers.get("content-range", "").startswith(wanted):
                    return Piece(b"", "the server answered another range")
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > end - start:
                        return Piece(b"", "the server sent more than the requested range")
                    if stop.is_set() or time.monotonic() > self.deadline:
                        return Piece(bytes(data[: end - start]), "the time for this download is over")
        except httpx.TransportError as error:
            return Piece(bytes(data[: end - start]), str(error) or type(error).__name__)
        missing = end - start - len(data)
        return Piece(bytes(data[: end - start]), f"{missing} bytes are missing" if missing > 0 else None)


@dataclass(frozen=True, slots=True)
class _Transfer:
    client: httpx.Client
    wanted: Download
    path: Path
    progress: Progress
    deadline: float  # A value of time.monotonic().

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_checked(self) -> bool:
        return self.wanted.sha256 is not None

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def run(self, limits: DownloadLimits) -> None:
        failures, best, url = 0, self.size_bytes, self.wanted.url
        while True:
            try:
                return self._attempt()
            except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
                raise DownloadError(f"{url}: {error}") from error
            except (_TryAgain, httpx.TransportError) as error:
                failures = 1 if self.size_bytes > best else failures + 1
                best = max(best, self.size_bytes)
                pause_s = limits.backoff.pause_s(failures - 1)
                if failures >= limits.tries or time.monotonic() + pause_s > self.deadline:
                    raise DownloadError(
                        f"{url}: {failure(error)} ({failures} tries without progress, {best} bytes are "
                        "kept); run the same command again to continue"
                    ) from error
                time.sleep(pause_s)

    def _attempt(self) -> None:
        headers = self._resume_headers()
        with self.client.stream("GET", self.wanted.url, headers=headers) as response:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                if response.headers.get("content-range") == f"bytes */{self.size_bytes}":
                    return None
                self.forget()
                raise _TryAgain("the server's file is shorter than the part that was downloaded before")
            _check_status(response, self.wanted.url)
            start = _start_of(response)
            if start not in (0, self.size_bytes):
                self.forget()
                raise _TryAgain(f"the server sent bytes from {start}, which were not requested")
            rest = byte_count(response.headers.get("content-length", ""))
            total = None if rest is None else start + rest
            needed = self.wanted.room_bytes + max(0, (total or 0) - self.size_bytes)
            check_room(self.path.parent, needed, self.wanted.url)
            self._remember(response)
            if total is None or not self._is_for_ranges(response, total - start):
                return self._append(response, start, total)
        return self._append_ranges(start, total)

    def _validator(self) -> str | None:
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
            return str(noted["validator"]) if noted["url"] == self.wanted.url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, response: httpx.Response) -> None:
        etag = response.headers.get("etag", "")
        validator = etag if etag.startswith('"') else response.headers.get("last-modified")
        if validator is None:
            self.note.unlink(missing_ok=True)
        else:
            self.note.write_text(json.dumps({"url": self.wanted.url, "validator": validator}), encoding="utf-8")

    def _range_headers(self) -> dict[str, str]:
        validator = self._validator()
        headers = {**self.wanted.headers, "Accept-Encoding": "identity"}
        return headers | ({"If-Range": validator} if validator else {})

    def _resume_headers(self) -> dict[str, str]:
        """Returns headers that request the missing range. They request all bytes if a change could go unnoticed."""
        headers = self._range_headers()
        if self.size_bytes and ("If-Range" in headers or self.is_checked):
            return headers | {"Range": f"bytes={self.size_bytes}-"}
        headers.pop("If-Range", None)
        return headers

    def _is_for_ranges(self, response: httpx.Response, rest: int) -> bool:
        gives = response.status_code == httpx.codes.PARTIAL_CONTENT or response.headers.get("accept-ranges") == "bytes"
        return rest >= _LARGE_BYTES and gives and (self.is_checked or self._validator() is not None)

    def _append(self, response: httpx.Response, start: int, total: int | None) -> None:
        done, unchecked = start, 0
        with self.path.open("r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in response.iter_raw():
                file.write(chunk)
                done, unchecked = done + len(chunk), unchecked + len(chunk)
                self.progress("downloading", done, total)
                if time.monotonic() > self.deadline:
                    raise _TryAgain("the time for this download is over")
                if total is None and unchecked > _DISK_RESERVE_BYTES // 2:
                    check_room(self.path.parent, 0, self.wanted.url)
                    unchecked = 0
        if total is not None and done != total:
            raise _TryAgain(f"{total - done} bytes are missing")

    def _append_ranges(self, start: int, total: int) -> None:
        done = start
        source = RangeSource(self.client, self.wanted.url, self._range_headers(), self.deadline)
        with self.path.open("r+b" if start else "wb") as file:
            file.seek(start)
            for piece in source.pieces(start, total):
                file.write(piece.data)
                file.flush()
                done += len(piece.data)
                self.progress("downloading", done, total)
                if piece.failure is not None:
                    raise _TryAgain(piece.failure)


def _check_status(response: httpx.Response, url: str) -> None:
    if response.status_code in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        if response.headers.get("content-encoding", "identity") != "identity":
            raise DownloadError(f"{url}: the server sent compressed bytes that were not requested")
        if url.startswith("https:") and response.url.scheme != "https":
            raise DownloadError(f"{url}: redirected to an address without TLS, {response.url}")
        return
    message = f"{url}: the server answered {response.status_code} {response.reason_phrase}".rstrip()
    raise _TryAgain(message) if response.status_code in RETRY_STATUSES else DownloadError(message)


def _start_of(response: httpx.Response) -> int:
    if response.status_code == httpx.codes.OK:
        return 0
    start = byte_count(response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0])
    return -1 if start is None else start
