"""Fixtures and pytest hooks for all tests."""

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

os.environ.setdefault("LLAMACLUST_CACHE_SIZE", "0")  # Temporary models must not fill the user's cache.
os.environ.setdefault("LLAMACLUST_WEIGHTS_SIZE", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Workers use this value. More threads would wait for each other.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (FOLDER, os.environ.get("PYTHONPATH"))))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Otherwise hundreds of processes would compile the program again.
sys.dont_write_bytecode = False
settings.register_profile("no clock decides", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock decides")
_GENERATED_CODE = GeneratedCode()  # Bytecode of all modules that tests import.
fork_workers()

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:  # Set by nohup, or by a shell for background jobs.
        # Processes that tests start must not ignore the signal: exec keeps SIG_IGN but resets handlers.
        signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Returns the path of SmolLM2-135M-Instruct Q4_1 from `make test`. Skips tests that need the file if it is
    missing."""
    from llamaclust.cluster.config.catalog import resolve_model

    try:
        return resolve_model("smollm2-135m-instruct")
    except UsageError as error:
        pytest.skip(f"the demo model is missing ({error})")


@pytest.fixture
def line() -> Iterator[CommandLine]:
    """Yields a command line with its own folders, and ends the processes that it leaves."""
    from support.clusters.command_line import command_line

    with command_line() as line:
        yield line


@pytest.fixture(scope="session", autouse=True)
def _full_disks_are_good_enough() -> None:
    """Layers are cached even if the machine's disk is nearly full."""
    from support.arithmetic.packed_layers import use_any_disk

    use_any_disk()


@pytest.fixture(autouse=True)
def _grammar_checkers_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the grammar checker processes that a test started, which would otherwise run until this process ends."""
    checker = sys.modules.get("llamaclust.model.grammars.checker")
    if checker is None:  # The test file does not use the module.
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
"""Unit tests: they use no processes, no networks and no models larger than a few KiB."""


@cache
def _is_unit(path: Path) -> bool:
    return str(path.relative_to(TESTS)).startswith(_UNIT_FOLDERS)


@cache
def _turn(path: Path) -> int:
    """Returns the sort key of a file: 0 for files with the longest tests, and 2 for unit tests."""
    return 0 if path.is_relative_to(TESTS / "e2e") else 2 if _is_unit(path) else 1


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips the import of other test files with `-m unit` or `-m alone`, which saves some seconds."""
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
    """Seeds Hypothesis with the seed of the run."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Excludes modules and tests from garbage collection. Scanning them takes a fifth of the collection of tests, and a
    third of a second for each gc.collect() in a test."""
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
