"""Starts Ray nodes as an administrator does, and lists the actors and placement groups in a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from support.clusters.command_line import eventually

RAY = Path(sys.executable).parent / "ray"
_STORE = "80000000"
_STARTS = 3  # as in `cluster/launchers/ray.py`
_LEFT = """
import json, logging, ray
ray.init(address="{address}", log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
groups = ray.util.placement_group_table().values()
actors = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
print(json.dumps([actors, [one["name"] for one in groups if one["state"] != "REMOVED"]]))
"""


@contextmanager
def ray_node(
    *where: str, cpus: int = 3, address: str, before: Sequence[str] = (), **environment: str
) -> Iterator[psutil.Process]:
    """Runs a Ray node, a head or one that joins as `where` says, and yields its raylet."""
    options: tuple[str, ...] = (f"--num-cpus={cpus}", f"--object-store-memory={_STORE}", f"--node-ip-address={address}")
    if "--head" in where:
        options += ("--include-dashboard=false",)
    command = [*before, str(RAY), "start", *where, *options, "--disable-usage-stats"]
    with tempfile.TemporaryDirectory(prefix="lc-ray-") as folder:
        processes = _started(command, Path(folder), {**os.environ, **environment})
        try:
            yield next(one for one in processes if one.name() == "raylet")
        finally:
            _end(processes)


def _started(command: Sequence[str], folder: Path, environment: dict[str, str]) -> list[psutil.Process]:
    said = ""
    for start in range(_STARTS):
        own = folder / str(start)
        try:
            done = subprocess.run(
                [*command, f"--temp-dir={own}"],
                env=environment,
                check=False,
                capture_output=True,
                text=True,
                timeout=60,
            )
            if done.returncode == 0:
                return _of(own)
            said += done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            said += str(error)
        _end(_of(own))
    raise AssertionError(said)


def _of(folder: Path) -> list[psutil.Process]:
    return [one for one in psutil.process_iter() if f"{folder}" in _words(one)]


def left_in(address: str, before: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Returns the names of actors and of placement groups in all namespaces."""
    program = _LEFT.format(address=address)
    done = subprocess.run([*before, sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    actors, groups = json.loads(done.stdout.splitlines()[-1])
    return sorted(actors), sorted(groups)


def _words(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _end(processes: Sequence[psutil.Process]) -> None:
    """Kills the processes and their descendants, and waits for their end."""
    below = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            below += process.children(recursive=True)
    for process in (*processes, *below):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: not any(_is_there(one) for one in (*processes, *below)), 60.0, "the end of Ray's processes")


def _is_there(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
