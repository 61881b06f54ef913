"""Checks that files appear only when complete: after kills, with concurrent writers and without disk space."""

from __future__ import annotations

import fcntl
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import UsageError
from llamaclust.model.gguf import atomic_file
from llamaclust.model.gguf.atomic_file import hidden_name, new_file, new_files, part_paths
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.imatrix import Importance, ImportanceMatrix, write_imatrix
from llamaclust.tools.evaluate.logits_file import LogitsShape, writing
from llamaclust.tools.progress import silent
from llamaclust.tools.quantize.mixes import MIXES
from llamaclust.tools.quantize.quantize import plan_quantizing, write_quantized
from llamaclust.tools.quantize.type_choice import MixChoice
from llamaclust.tools.split import SplitRules, plan_split, write_parts
from support.models.tiny_model import build_tiny_model

_WRITES = """
import sys
from pathlib import Path
from llamaclust.model.gguf.atomic_file import new_files
paths = [Path(one) for one in sys.argv[1:]]
with new_files(paths, 0) as opened:
    for path in paths:
        with opened(path) as file:
            file.write(b"half")
    print("there", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def another_process(paths: list[Path]) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a process that has written all files under hidden names, and kills it at the end."""
    command = [sys.executable, "-c", _WRITES, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        yield process
        process.send_signal(signal.SIGKILL)


def written(paths: list[Path], data: bytes) -> None:
    with new_files(paths, len(data)) as opened:
        for path in paths:
            with opened(path) as file:
                file.write(data)


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    """Checks that a run removes remains of the same model, even with other parts, but not those of another model."""
    out, other = tmp_path / "m.gguf", tmp_path / "m2-00001-of-00002.gguf"
    for count in (3, 5):
        with another_process(part_paths(out, count)):
            pass
    with another_process([other]):
        pass
    assert len(names(tmp_path)) == 6, "the second of them cleared what the first one left"
    written(part_paths(out, 3), b"whole")
    parts = [path.name for path in part_paths(out, 3)]
    assert names(tmp_path) == sorted([hidden_name(other).name, *parts])
    assert all((tmp_path / name).read_bytes() == b"whole" for name in parts)


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    mine, others = part_paths(out, 2), part_paths(out, 3)
    with another_process(others):
        with pytest.raises(UsageError, match="another process is writing it"):
            written(others, b"whole")
        written(mine, b"whole")
        assert names(tmp_path) == sorted([*(hidden_name(path).name for path in others), *(p.name for p in mine)])
        assert hidden_name(others[2]).read_bytes() == b"half"


def test_a_lock_on_a_file_that_has_its_name_by_now_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that a hidden file is not emptied if its writer ends between the opening and the locking."""
    path, flock = tmp_path / "x", fcntl.flock
    with monkeypatch.context() as patched:
        first = new_file(path, 0)
        first.__enter__().write(b"first")

        def late(*arguments: int) -> None:
            patched.undo()
            first.__exit__(None, None, None)
            flock(*arguments)

        patched.setattr(fcntl, "flock", late)
        with new_file(path, 0) as file:
            assert path.read_bytes() == b"first"
            file.write(b"second")
    assert path.read_bytes() == b"second" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["_no_links", "take_lock", "_is_at", "_clear"])
def test_an_interrupt_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    original = getattr(atomic_file, step)

    def interrupted(*arguments: object) -> None:
        monkeypatch.undo()
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_file, step, interrupted)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "x", 0):
        pass
    assert names(tmp_path) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    hidden_name(tmp_path / "x").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), new_file(tmp_path / "x", 0):
        pass
    assert (tmp_path / "mine").read_bytes() == b"mine"


def _split(model: Path, out: Path) -> None:
    write_parts(plan_split(open_model(model), out, SplitRules(most_tensors=5)), silent)


def _quantize(model: Path, out: Path) -> None:
    job = plan_quantizing(open_model(model), MixChoice(MIXES["Q8_0"]), None, allow_requantize=True)
    write_quantized(job, out, 1, False, lambda *_: None)


def _old_imatrix(model: Path, out: Path) -> None:
    ones = Importance(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    write_imatrix(out.with_suffix(".dat"), ImportanceMatrix({"x": ones}, 1, 64, ()))


def _logits(model: Path, out: Path) -> None:
    with writing(out, LogitsShape(8, 32, 2), [[0] * 8] * 2):
        pass


@pytest.mark.parametrize("write", [_split, _quantize, _old_imatrix, _logits])
def test_whatever_writes_says_first_that_there_is_no_room(
    write: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=1, hidden=64, heads=4, ffn=96)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 24))
    with pytest.raises(UsageError, match=r"needs 17 MiB on the disk, but 16 MiB are free"):
        write(model, tmp_path / "out.gguf")
    assert names(tmp_path) == ["tiny.gguf"]
