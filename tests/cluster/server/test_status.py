"""Tests what `GET /cluster` says of requests and links."""

from __future__ import annotations

import pytest

from llamaclust.cluster.planner.context import ContextBounds, ContextChoice
from llamaclust.cluster.planner.links import Link, Links
from llamaclust.cluster.planner.plan import Plan, StagePlan
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.cluster.server.status import links_json, sequences_json

SECOND_NS = 10**9


def sequence(key: int) -> Sequence:
    request = GenerationRequest(f"{key:024x}", tuple(range(40)), 9)
    return Sequence(key=key, request=request, max_new_tokens=9, usage=Usage(SECOND_NS))


def stage(worker: str) -> StagePlan:
    return StagePlan(
        worker=worker,
        start=0,
        end=1,
        weight_bytes=0,
        touched_bytes=0,
        kv_bytes=0,
        workspace_bytes=0,
        memory_bytes=None,
    )


def test_requests_are_listed_with_their_progress_and_without_their_whole_ids() -> None:
    computed = sequence(0x123456789ABCDEF << 32)
    computed.scheduled, computed.usage.cached_tokens = 50, 16
    computed.drafting.rows, computed.drafting.accepted = 7, 5
    computed.tokens += [1, 2, 3]
    waiting = sequence(1)
    listed = sequences_json([computed, waiting], 3 * SECOND_NS)
    assert listed[0] == {
        "id": "01234567",
        "phase": "waiting",
        "prompt_tokens": 40,
        "cached_tokens": 16,
        "computed_tokens": 40,
        "generated_tokens": 3,
        "drafted_tokens": 7,
        "accepted_tokens": 5,
        "max_new_tokens": 9,
        "age_s": 2.0,
    }
    assert (listed[1]["cached_tokens"], listed[1]["computed_tokens"]) == (0, 0)


def test_the_list_of_requests_is_bounded() -> None:
    assert len(sequences_json([sequence(key) for key in range(100)], 0)) == 64


def test_links_lead_through_the_stages_and_back() -> None:
    plan = Plan((stage("a"), stage("b")), 1, ContextChoice(256, ContextBounds.fixed(256)), (), None)
    measured = {frozenset(("a", "b")): Link(one_way_s=1e-4, byte_s=1e-9), frozenset(("", "a")): Link(5e-5, 0.0)}
    links = links_json(plan, Links(measured))
    assert [(link["from"], link["to"]) for link in links] == [("", "a"), ("a", "b"), ("b", "")]
    assert [link["round_trip_ms"] for link in links] == [pytest.approx(0.1), pytest.approx(0.2), None]
    assert [link["bytes_per_s"] for link in links] == [None, pytest.approx(1e9), None]
