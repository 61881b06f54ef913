"""Tests of a model file that is changed, truncated or deleted: loaded stages keep their bits, and new loads refuse the
file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from support.clusters.command_line import CommandLine, command_line, eventually
from support.clusters.faults.worker_program import run_in_workers
from support.models.hostile_models import tiny


def overwrite(path: Path) -> None:
    """Overwrites the end of the file in place."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """Replaces the file by another model."""
    other = tiny(path.with_suffix(".other"), seed=7)
    other.replace(path)


CHANGES: tuple[Callable[[Path], None], ...] = (overwrite, replace, shrink, Path.unlink)


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        yield line


@pytest.fixture
def model(line: CommandLine) -> Path:
    path = line.folder / "model.gguf"
    path.unlink(missing_ok=True)
    return Path(shutil.copyfile(line.folder / "good.gguf", path))


def test_a_running_cluster_goes_on_with_the_same_bits(line: CommandLine, model: Path) -> None:
    with line.cluster(model, prefix_cache=False) as cluster:
        before = cluster.answer()
        with cluster.http.stream(
            "POST", "/completion", json={"prompt": "a", "n_predict": 900, "stream": True}
        ) as reply:
            lines = reply.iter_lines()
            assert next(lines)
            for change in CHANGES:
                change(model)
                assert cluster.answer() == before
            assert sum(1 for _ in lines) > 0
        assert cluster.status["state"] == "ready"
        assert cluster.http.post("/tokenize", json={"content": "hello"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (overwrite, "it was changed or replaced"),
        (shrink, "the file is incomplete"),
        (Path.unlink, "no such file"),
    ],
)
def test_a_load_refuses_the_file_by_name(
    line: CommandLine, model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], says: str
) -> None:
    run_in_workers(monkeypatch, line.folder, "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)")
    running = line.start("up", line.cluster_file(model))
    workers = running.workers(2).values()  # The coordinator has opened the model before workers start.
    stopped = lambda: all(worker.status() == psutil.STATUS_STOPPED for worker in workers)  # noqa: E731
    eventually(stopped, 60.0, "workers that stop themselves")
    change(model)
    for worker in workers:
        worker.resume()
    done = running.wait()
    assert done.code == 2 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: worker ") and str(model) in last and says in last
    eventually(lambda: not line.left_running(), 60.0, "the end of every process")
