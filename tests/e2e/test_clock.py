"""Tests of a cluster whose system clock is changed while it serves, with libfaketime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import CommandLine, Running, command_line, eventually
from support.clusters.static_cluster import join_port, named, ready, start_coordinator, start_worker
from support.models.tiny_model import build_tiny_model

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
WITHIN_S = 60.0  # Certificates are checked every five seconds.


@pytest.fixture
def line() -> Iterator[CommandLine]:
    if not LIBRARIES:
        pytest.skip("missing: libfaketime (Debian, Ubuntu: sudo make system-deps-test)")
    with command_line() as opened:
        yield opened


@pytest.fixture
def clock(line: CommandLine) -> Path:
    """Returns the file with the offset of the clock, which libfaketime reads once a second."""
    clock = line.folder / "clock"
    clock.write_text("+0")
    line.set_variables(
        LD_PRELOAD=str(LIBRARIES[0]),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_CACHE_DURATION="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        NO_FAKE_STAT="1",
    )
    return clock


def test_new_links_are_made_on_a_clock_that_was_set(line: CommandLine, clock: Path, tmp_path: Path) -> None:
    """All certificates have expired on a clock that is two days ahead. Later certificates are not yet valid on a clock
    that is a year back."""
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=2, quant_type=QuantType.Q8_0)
    plan = [{"worker": "a", "layers": [0, 1]}, {"worker": "b", "layers": [1, 2]}]
    keys: dict[str, Any] = {"workers": named("a", "b"), "plan": plan, "timeouts": {"worker": "10s"}}
    coordinator = start_coordinator(line, model, **keys)
    port = join_port(coordinator)
    first, second = (start_worker(line, port, name) for name in "ab")
    with ready(coordinator, line) as cluster:
        before = cluster.answer()
        for jump in ("+2d", "-365d"):
            renewed = renewals(first)
            clock.write_text(jump)
            eventually(lambda renewed=renewed: renewals(first) > renewed, WITHIN_S, "a new certificate")  # type: ignore[misc]
            second.kill()
            second = start_worker(line, port, "b")
            assert cluster.answer() == before
    line.end_commands()


def renewals(worker: Running) -> int:
    return worker.err.read_text().count("the certificate is renewed")
