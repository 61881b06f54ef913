"""Fixtures that several areas share."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from llamaclust.core.errors import UsageError
from support.clusters.forking.forked_workers import fork_workers
from support.clusters.quick_start.sitecustomize import FOLDER, GeneratedCode
from support.paths import TESTS
from support.seed import SEED

if TYPE_CHECKING:
    from llamaclust.model.grammars.checker import GrammarChecker
    from llamaclust.model.grammars.checker_process import CheckLimits
    from llamaclust.model.tokenizers.tokenizer import Tokenizer
    from support.clusters.command_line import CommandLine

os.environ.setdefault("LLAMACLUST_CACHE_SIZE", "0")  # a user's packed layers are not for models that tests make up
os.environ.setdefault("LLAMACLUST_WEIGHTS_SIZE", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as workers have it: more would wait for each other
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH"))))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the program anew
sys.dont_write_bytecode = False
settings.register_profile("no clock decides", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock decides")
_GENERATED_CODE = GeneratedCode()  # of all that tests import
fork_workers()

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:  # as nohup or a shell's background has it
        # Ignored here as before, but not by the processes that tests start: exec keeps SIG_IGN and resets handlers.
        signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1, where `make test` puts it; tests that need it skip without it."""
    from llamaclust.cluster.config.catalog import resolve_model

    try:
        return resolve_model("smollm2-135m-instruct")
    except UsageError as error:
        pytest.skip(f"the demo model is missing ({error})")


@pytest.fixture
def line() -> Iterator[CommandLine]:
    """Runs commands in folders of their own, and ends what they leave."""
    from support.clusters.command_line import command_line

    with command_line() as line:
        yield line


@pytest.fixture(scope="session", autouse=True)
def _full_disks_are_good_enough() -> None:
    """Free space of the machine's disk does not decide whether layers are cached."""
    from support.arithmetic.packed_layers import use_any_disk

    use_any_disk()


@pytest.fixture(autouse=True)
def _grammar_checkers_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the checkers that a test's text services made: their processes would stay as long as this one."""
    checker = sys.modules.get("llamaclust.model.grammars.checker")
    if checker is None:  # the test file does not use it
        yield
        return
    begin, made = checker.GrammarChecker.__init__, []

    def begun(self: GrammarChecker, tokenizer: Tokenizer, limits: CheckLimits | None = None) -> None:
        begin(self, tokenizer, limits)
        made.append(self)

    monkeypatch.setattr(checker.GrammarChecker, "__init__", begun)
    yield
    for each in made:
        each.close()


_UNIT_FOLDERS = (
    "core",
    "cluster/config",
    "cluster/engine",
    "cluster/planner",
    "cluster/scheduler",
    "cluster/state/test_directory",
    "cluster/front/text",
    "wire/rpc",
    "wire/test_",
)
"""Tests without processes, networks or models of more than a few KiB, which take seconds in all."""


@cache
def _is_unit(path: Path) -> bool:
    return str(path.relative_to(TESTS)).startswith(_UNIT_FOLDERS)


@cache
def _turn(path: Path) -> int:
    """Returns the turn of a file: those with the longest tests come first, those with the shortest at the end."""
    return 0 if path.is_relative_to(TESTS / "e2e") else 2 if _is_unit(path) else 1


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m unit` and `-m alone` do not import the other test files, which takes some seconds."""
    if not collection_path.name.startswith("test_") or not collection_path.is_file():
        return None
    match config.option.markexpr:
        case "unit":
            return None if _is_unit(collection_path) else True
        case "alone":
            return None if "mark.alone" in collection_path.read_text() else True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Examples of Hypothesis follow from the seed of the run."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests stay to the end: looking through them for garbage takes a fifth of the collection, and a third
    of a second whenever a test asks for it."""
    gc.disable()
    try:
        return (yield)
    finally:
        _GENERATED_CODE.save()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.path))
    for item in items:
        if _is_unit(item.path) and item.get_closest_marker("alone") is None:
            item.add_marker("unit")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.line(f"random seed {SEED}; the same again: LLAMACLUST_TEST_SEED={SEED}")
