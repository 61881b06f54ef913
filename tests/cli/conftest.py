"""Fixtures that tests of commands share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.clusters.command_line import CommandLine, command_line
from support.models.hostile_models import tiny


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    """Yields a command line whose folder contains a model."""
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        yield line
