"""Owns a cluster's files in `<state_dir>/<cluster name>/`: its lock, its logs, and the record that `status` and `down`
read. Only the owner can read these files."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.launcher_facts import LAUNCHERS, LauncherName
from llamaclust.cluster.state.file_lock import FileLock, is_locked
from llamaclust.cluster.state.log_files import limit_logs
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.regular_file import read_json, write_text
from llamaclust.core.this_machine import start_ticks

Value = TypeVar("Value")

ELSEWHERE = ".elsewhere"
_PROBE_S = 0.05
"""Seconds until a second attempt to lock. The first may fail because another process briefly checks the lock."""
_POLL_S = 0.05
_NOT_A_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
_STANDBY_LOOK_S = 0.05
_LOOK_S = 0.5


def _own_start_ticks() -> int:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    return ticks


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    name: str
    pid: int
    api: str  # http://HOST:PORT or https://HOST:PORT.
    model: str
    api_keys_file: str | None = None  # File in which this user's programs find a key. None if the API needs no key.
    launcher: LauncherName = "local"
    # File with the certificate that the API presents, for this user's programs. None if the API uses plain HTTP.
    api_certificate: str | None = None
    trust_dir: str | None = None  # The cluster file's `join.trust_dir`.
    start_ticks: int = field(default_factory=_own_start_ticks)  # Start time of the process, in clock ticks since boot.

    @property
    def is_local(self) -> bool:
        return LAUNCHERS[self.launcher].is_local

    def signal(self, number: signal.Signals) -> None:
        if start_ticks(self.pid) != self.start_ticks:
            what = f"cluster {self.name}: its record has pid {self.pid}, which is not its coordinator"
            raise LlamaclustError(f"{what}; the coordinator may run in another container: search for it with `ps`")
        os.kill(self.pid, number)


_RECORD = TypeAdapter(ClusterRecord)


@dataclass(frozen=True, slots=True)
class ClusterDir:
    path: Path
    _published: list[ClusterRecord] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log_file(self, worker: str) -> Path:
        return self.logs / f"{worker}.log"

    @property
    def control(self) -> Path:
        return self.path / "control.json"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters.json"

    @property
    def journal(self) -> Path:
        return self.path / "requests.journal"

    @property
    def has_requests(self) -> bool:
        with contextlib.suppress(OSError):
            return self.journal.stat().st_size > 0
        return False

    @property
    def api_pem(self) -> Path:
        return self.path / "api.pem"

    @property
    def api_certificate(self) -> Path:
        return self.path / "api.crt"

    @property
    def _record(self) -> Path:
        return self.path / "cluster.json"

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    @property
    def _stopped(self) -> Path:
        return self.path / "stopped"

    @property
    def _standby(self) -> Path:
        return self.path / "standby"

    def create(self) -> None:
        """Creates the folder. Raises UsageError if another user owns it or can write to its parent, and LlamaclustError
        if it cannot be created, for example because a file system is not mounted yet."""
        try:
            self.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.path, self.logs):
                _check_owner(folder.stat().st_uid, folder)
            mode = self.path.parent.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise UsageError(f"{self.path.parent}: other users can write to it; run: chmod o-w {self.path.parent}")
            self.path.chmod(0o700)
        except OSError as error:
            what = f"{self.path}: cannot be created: {error.strerror}; set `state_dir:` or LLAMACLUST_STATE_DIR"
            raise LlamaclustError(f"{what} to a folder of your own") from error

    @contextlib.contextmanager
    def locked(self, *, is_standby: bool = False) -> Iterator[bool]:
        """Locks the cluster's name and yields True. Raises UsageError if another process holds the lock. A standby
        instead waits for the lock, and yields False if a signal or `llamaclust down` stopped the lock's last holder."""
        self.create()
        lock, is_stopped = FileLock(self._lock), False
        if is_standby:
            is_stopped = self._await_end(lock)
        else:
            self._take(lock)
        if not is_stopped:
            self._forget_last()
        with self._brought_back(lock):
            yield not is_stopped

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Locks the cluster's name for the Lease's holder. Continues without the lock if a hung process holds it."""
        self.create()
        self._forget_last()
        lock = FileLock(self._lock)
        with contextlib.suppress(OSError):
            lock.take()
        with self._brought_back(lock):
            yield

    @contextlib.contextmanager
    def _brought_back(self, lock: FileLock) -> Iterator[None]:
        end = threading.Event()
        watch = threading.Thread(target=self._watch, args=(lock, end), name="state", daemon=True)
        watch.start()
        try:
            yield
        finally:
            end.set()
            watch.join()
            lock.release()

    def _take(self, lock: FileLock) -> None:
        if not lock.take():
            time.sleep(_PROBE_S)
            if not lock.take():
                raise UsageError(self._taken())

    def _forget_last(self) -> None:
        self._record.unlink(missing_ok=True)
        self._stopped.unlink(missing_ok=True)

    def _await_end(self, lock: FileLock) -> bool:
        """Waits for the lock. Returns True if a signal or `llamaclust down` stopped the lock's last holder."""
        has_waited, standby = False, FileLock(self._standby)
        try:
            while not self._has_ended(lock):
                with contextlib.suppress(OSError):
                    if not standby.is_held:
                        standby.take()
                has_waited = True
                time.sleep(_STANDBY_LOOK_S)
        finally:
            standby.release()
        # The result is also False if a file server is unreachable.
        return has_waited and os.access(self._stopped, os.F_OK)

    def _has_ended(self, lock: FileLock) -> bool:
        try:
            return lock.take_next()
        except OSError:
            with contextlib.suppress(OSError, LlamaclustError):
                self.create()
            return False

    def _watch(self, lock: FileLock, end: threading.Event) -> None:
        while not end.wait(_LOOK_S):
            with contextlib.suppress(OSError, LlamaclustError):
                self._restore(lock)
            with contextlib.suppress(OSError):
                limit_logs(self.logs)

    def _restore(self, lock: FileLock) -> None:
        """Restores the lock file and the record if they were deleted, so that no other cluster can take this name."""
        if not lock.is_held:
            self.create()
            if not lock.take():
                return
        elif self._record.exists():
            return
        for record in tuple(self._published):
            self.write_record(record)

    def _taken(self) -> str:
        record = self.read_record()
        where = f" (pid {record.pid}, {record.api})" if record else ""
        name = self.path.name
        return (
            f"a cluster named {name!r} is already running{where}: `llamaclust status --cluster {name}` shows it, "
            f"`llamaclust down --cluster {name}` stops it; or choose another name (`--set name=...`)"
        )

    @property
    def is_running(self) -> bool:
        return is_locked(self._lock)

    @property
    def has_standby(self) -> bool:
        return is_locked(self._standby)

    def ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.is_running:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
        return True

    def write_record(self, record: ClusterRecord) -> None:
        """Writes the record. Links the cluster into the default state directory if its own folder is elsewhere."""
        write_private(self._record, _RECORD.dump_json(record).decode())
        self._published[:] = [record]
        if self._link is not None:
            with contextlib.suppress(OSError):  # The cluster is served even if the link cannot be created.
                self._link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._link.unlink(missing_ok=True)
                self._link.symlink_to(self.path.absolute())

    @property
    def _link(self) -> Path | None:
        usual = environment().state_dir
        return None if self.path.parent.absolute() == usual.absolute() else usual / ELSEWHERE / self.path.name

    def read_record(self) -> ClusterRecord | None:
        try:
            return read_as(self._record, _RECORD)
        except (OSError, ValueError):
            return None

    def remove_record(self, *, is_stopped: bool = False) -> None:
        """Removes the record, unless another cluster of the same name has written it. If `is_stopped` is true, no
        standby takes over from this coordinator."""
        own, self._published[:] = tuple(self._published), ()
        record = self.read_record()
        if record is None or record in own or not self.is_running:
            if is_stopped:
                self.mark_stopped()
            self.forget_record()

    def mark_stopped(self) -> None:
        with contextlib.suppress(OSError):
            self._stopped.touch(mode=0o600)

    def forget_record(self) -> None:
        self._record.unlink(missing_ok=True)
        if self._link is not None:
            with contextlib.suppress(OSError):
                if self._link.readlink() == self.path.absolute():
                    self._link.unlink()


def open_log(path: Path, *, anew: bool) -> int:
    """Opens a log for appending. Raises UsageError if the path is not a regular file or belongs to another user."""
    how = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, how, 0o600)
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        raise UsageError(f"{path} is not a regular file, but must be a log file; remove it") from error
    try:
        _check_owner(os.fstat(descriptor).st_uid, path)
        if anew:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_owner(user: int, path: Path) -> None:
    if user != os.geteuid():
        what = f"{path} belongs to user {user}, and this process runs as user {os.geteuid()}"
        raise UsageError(f"{what}; set `state_dir:` or LLAMACLUST_STATE_DIR to a folder of your own")


def read_values(path: Path, kind: TypeAdapter[dict[str, Value]]) -> dict[str, Value]:
    try:
        return read_as(path, kind)
    except (OSError, ValueError):
        return {}


def read_as(path: Path, kind: TypeAdapter[Value]) -> Value:
    """Reads a JSON file. Raises OSError if the file cannot be read, and ValueError if its content is invalid."""
    try:
        return kind.validate_python(read_json(path))
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from error


def write_private(path: Path, text: str, *, is_synced: bool = True) -> None:
    try:
        write_text(path, text, is_synced=is_synced)
    except OSError as error:
        what = f"{path}: cannot be written: {error.strerror}"
        raise LlamaclustError(f"{what}; free disk space, or set `state_dir:` or LLAMACLUST_STATE_DIR") from error
