"""Tests of the header `traceparent` of W3C Trace Context, and of the choice of traced requests."""

from __future__ import annotations

import random

import pytest

from llamaclust.cluster.engine.trace_context import TraceContext
from llamaclust.cluster.server.telemetry.trace_sampler import TraceSampler
from support.seed import SEED

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{SPAN}-01"


def test_a_trace_context_is_read_and_written() -> None:
    context = TraceContext.parse([GIVEN], ["a=1", "b=2"])
    assert context is not None and (context.trace_id.hex(), context.span_id.hex()) == (TRACE, SPAN)
    assert context.is_sampled and context.state == "a=1,b=2" and context.traceparent == GIVEN
    unsampled = TraceContext.parse([f"00-{TRACE}-{SPAN}-02"])
    assert unsampled is not None and not unsampled.is_sampled


@pytest.mark.parametrize(
    "given",
    [
        [],
        [GIVEN, GIVEN],
        [""],
        [GIVEN.upper()],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE[1:]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN[:-1]}g-01"],
        [f"cc-{TRACE}-{SPAN}-01-{'x' * 1000}"],
        [f"cc-{TRACE}-{SPAN}-01more"],
        [f"00-{TRACE}-{SPAN}-01\n"[:-1] + "\r\nx: y"],
    ],
)
def test_a_malformed_header_is_ignored(given: list[str]) -> None:
    assert TraceContext.parse(given) is None
    begun = TraceSampler().begin(given, ["a=1"])
    assert begun is not None and begun.parent is None and begun.parent_span_id == b"" and begun.own.state == ""


def test_a_later_version_may_have_more_fields() -> None:
    assert TraceContext.parse([f"cc-{TRACE}-{SPAN}-01"]) == TraceContext.parse([f"cc-{TRACE}-{SPAN}-01-more"])


@pytest.mark.parametrize("state", ["a=\x00", "a=é", "a=" + "1" * 600])
def test_a_malformed_state_is_dropped_alone(state: str) -> None:
    context = TraceContext.parse([GIVEN], [state])
    assert context is not None and context.state == ""


def test_a_sampled_request_continues_the_trace_of_its_client() -> None:
    begun = TraceSampler().begin([GIVEN], ["a=1"])
    assert begun is not None and begun.parent is not None
    assert (begun.own.trace_id.hex(), begun.parent_span_id.hex(), begun.own.state) == (TRACE, SPAN, "a=1")
    assert begun.own.span_id != begun.parent.span_id and begun.own.is_sampled


def test_the_client_decides_unless_the_ratio_does() -> None:
    unsampled = [f"00-{TRACE}-{SPAN}-00"]
    assert TraceSampler(1.0).begin(unsampled, []) is None
    assert TraceSampler(0.0).begin([GIVEN], []) is not None
    assert TraceSampler(1.0, obeys_parent=False).begin(unsampled, []) is not None
    assert TraceSampler(0.0, obeys_parent=False).begin([GIVEN], []) is None
    assert TraceSampler(0.0).begin([], []) is None


def test_the_ratio_is_the_share_of_traces_and_all_programs_keep_the_same_ones() -> None:
    source = random.Random(SEED)
    headers = [f"00-{source.getrandbits(128) | 1:032x}-{SPAN}-00" for _ in range(4000)]
    kept = {
        ratio: {h for h in headers if TraceSampler(ratio, obeys_parent=False).begin([h], [])} for ratio in (0.1, 0.5)
    }
    assert 250 < len(kept[0.1]) < 550 and 1750 < len(kept[0.5]) < 2250 and kept[0.1] < kept[0.5]
    assert kept[0.5] == {header for header in headers if int(header[19:35], 16) < 1 << 63}
