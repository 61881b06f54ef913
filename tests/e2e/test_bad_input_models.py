"""Tests of model files that cannot run, with the command line: one line with file and place, exit status 2, and no
worker."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from support.clusters.command_line import CommandLine, command_line, eventually
from support.models.hostile_models import HEADERS, damaged_files, tiny, unusable_files

DAMAGED = [*HEADERS, "data cut short", "header cut short", "missing", "folder", "pipe", "loop of links"]
DAMAGED += ["missing part", "cyclic parts"]
UNUSABLE = ["architecture", "layers as text", "layers without end", "one layer more", "no heads", "another width"]
UNUSABLE += ["no kernels", "no vector type"]
DAMAGED_BY = list(zip(DAMAGED, cycle(("info", "plan", "generate")), strict=False))
UNUSABLE_BY = list(zip(UNUSABLE, cycle(("generate", "plan")), strict=False))


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        yield line


@pytest.fixture(scope="module")
def files(line: CommandLine) -> dict[str, tuple[Path, str]]:
    good = tiny(line.folder / "good.gguf")
    files = damaged_files(line.folder, good) | unusable_files(line.folder, good)
    assert list(files) == [*DAMAGED, *UNUSABLE]
    return files


def refusals(line: CommandLine, path: Path, command: str) -> list[str]:
    """Returns the errors of `up` and of another command for the model."""
    cluster = line.cluster_file(path)
    arguments = {
        "plan": ("plan", cluster),
        "generate": ("generate", "--model", path, "hello"),
        "info": ("model", "info", path),
    }
    ended = line.run("up", cluster), line.run(*arguments[command])
    assert [done.code for done in ended] == [2, 2]
    return [done.error for done in ended]


def check(line: CommandLine, says: str, path: Path, command: str) -> None:
    for error in refusals(line, path, command):
        assert says in error and path.name in error and len(error) < 500
    assert not line.cluster_dir("tiny").joinpath("logs", "a.log").exists()


@pytest.mark.parametrize(("name", "command"), DAMAGED_BY)
def test_a_damaged_file_is_refused(
    line: CommandLine, files: dict[str, tuple[Path, str]], name: str, command: str
) -> None:
    check(line, files[name][1], files[name][0], command)


@pytest.mark.parametrize(("name", "command"), UNUSABLE_BY)
def test_a_model_that_cannot_run_here_is_refused_before_a_worker_starts(
    line: CommandLine, files: dict[str, tuple[Path, str]], name: str, command: str
) -> None:
    check(line, files[name][1], files[name][0], command)


def test_such_a_model_can_still_be_looked_into(line: CommandLine, files: dict[str, tuple[Path, str]]) -> None:
    assert "martian" in line.run("model", "info", files["architecture"][0]).out


def test_a_tokenizer_that_is_not_supported_is_named_with_its_file(line: CommandLine) -> None:
    path = tiny(line.folder / "no tokenizer.gguf", extra={"tokenizer.ggml.model": "martian"})
    for error in refusals(line, path, "generate"):
        assert f"{path}: tokenizer.ggml.model: " in error and "'martian'" in error
    eventually(lambda: not line.left_running(), 60.0, "the end of every process")
