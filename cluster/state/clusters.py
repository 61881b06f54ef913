"""Finds this user's running clusters and the logs of the cluster that ended last."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path

from llamaclust.cluster.state.directory import ELSEWHERE, ClusterDir, ClusterRecord
from llamaclust.core.errors import UsageError


def running_clusters(state_dir: Path) -> dict[str, tuple[ClusterDir, ClusterRecord]]:
    found = {folder.path.name: (folder, folder.read_record()) for folder in _folders(state_dir) if folder.is_running}
    return {name: (folder, record) for name, (folder, record) in found.items() if record is not None}


def recorded_clusters(state_dir: Path) -> list[ClusterRecord]:
    records = (folder.read_record() for folder in _folders(state_dir))
    return [record for record in records if record is not None]


def find_running(state_dir: Path, name: str | None) -> tuple[ClusterDir, ClusterRecord]:
    """Returns the running cluster `name`, or the only running cluster if `name` is None. Raises UsageError if there is
    none, or if `name` is None and there are several."""
    running = running_clusters(state_dir)
    if name is None and len(running) == 1:
        name = next(iter(running))
    if name is not None and name in running:
        return running[name]
    if name is not None or not running:
        _check_record(state_dir, name)
    last = _last_ended(state_dir, name)
    if not running:
        raise UsageError(f"no cluster is running: start one with `llamaclust up`{last}")
    choose = f"choose one of {', '.join(running)} with --cluster"
    if name is None:
        raise UsageError(f"several clusters are running: {choose}; `llamaclust status` lists them")
    raise UsageError(f"no cluster named {name!r} is running: {choose}{last}")


def _check_record(state_dir: Path, name: str | None) -> None:
    for folder in _folders(state_dir):
        if name in (None, folder.path.name) and folder.is_running:
            raise UsageError(f"cluster {folder.path.name} is starting or ending: try again in a few seconds")


def _folders(state_dir: Path) -> list[ClusterDir]:
    elsewhere = [path.resolve() for path in sorted((state_dir / ELSEWHERE).glob("*")) if path.is_dir()]
    here = [path for path in sorted(state_dir.glob("*")) if path.is_dir() and not path.name.startswith(".")]
    return [ClusterDir(path) for path in (*elsewhere, *here)]


def _last_ended(state_dir: Path, name: str | None) -> str:
    of_name = [folder for folder in _folders(state_dir) if name in (None, folder.path.name)]
    ended = [folder for folder in of_name if _last_change_s(folder) and not folder.is_running]
    if not ended:
        return ""
    last = max(ended, key=lambda folder: (_was_killed(folder), _last_change_s(folder)))
    logs = last.logs if any(last.logs.glob("*")) else None
    if _was_killed(last):
        return f"; {last.path.name} ended unexpectedly" + (f", its logs: {logs}" if logs else "")
    return f"; logs of the last cluster: {logs}" if logs else ""


def _was_killed(folder: ClusterDir) -> bool:
    return folder.read_record() is not None


def _last_change_s(folder: ClusterDir) -> float:
    last_s = 0.0
    for path in (*folder.path.glob("*"), *folder.logs.glob("*")):
        with suppress(FileNotFoundError):  # A running cluster may delete a temporary file meanwhile.
            entry = path.lstat()
            last_s = max(last_s, 0.0 if stat.S_ISDIR(entry.st_mode) else entry.st_mtime)
    return last_s
