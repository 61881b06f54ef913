"""Tests of pipes, devices and folders in place of a state folder's files: nothing blocks or reads without end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llamaclust.cluster.front.http.certificate import keep_self_signed
from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.log_tail import last_error
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.measurements import read_other_loads, read_profiles
from llamaclust.core.errors import LlamaclustError, UsageError
from support.wire.trust import authority


def _linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


_THINGS = {
    "pipe": os.mkfifo,
    "link to a pipe": _linked_pipe,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


def _log(path: Path, put: Callable[[Path], None]) -> None:
    put(path / "a.log")
    assert last_error(path / "a.log") == ""


def _trust(name: str) -> Callable[[Path, Callable[[Path], None]], None]:
    def read(path: Path, put: Callable[[Path], None]) -> None:
        authority(path)
        file = path / "trust" / name
        file.unlink()
        put(file)
        with pytest.raises(UsageError):
            Authority.open(path / "trust")

    return read


def _certificate(path: Path, put: Callable[[Path], None]) -> None:
    """Checks that a new certificate replaces a pipe."""
    put(path / "api.pem")
    try:
        keep_self_signed(path / "api.pem", ["localhost"])
        assert (path / "api.pem").read_bytes().startswith(b"-----BEGIN")
    except LlamaclustError:
        assert (path / "api.pem").is_dir()


def _record(path: Path, put: Callable[[Path], None]) -> None:
    """Checks that the record, and the measurements beside it, are not read."""
    for name in ("cluster.json", ".profiles.json"):
        put(path / name)
        (path / "pipe").unlink(missing_ok=True)
    assert ClusterDir(path).read_record() is None
    assert read_profiles(path) == {} and read_other_loads(path) == {}


_READERS = {
    "log": _log,
    "key": _trust("ca.key"),
    "certificate": _trust("ca.crt"),
    "token": _trust("token"),
    "API certificate": _certificate,
    "record": _record,
}


@pytest.mark.parametrize("reader", _READERS)
@pytest.mark.parametrize("thing", _THINGS)
def test_no_command_blocks_on_what_is_no_file(reader: str, thing: str, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def read() -> None:
        try:
            _READERS[reader](tmp_path, _THINGS[thing])
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it blocks"
    for error in errors:
        raise error
