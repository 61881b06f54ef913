"""Tests what load orders tell the members of a group about each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.load_orders import StageLoads, load_orders
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.core.errors import WorkerError
from llamaclust.wire.control.messages import Load
from support.arithmetic.batches import LIMITS

CHAIN = (("ab", (1, 2)), ("c", ()), ("dea", (3, 1, 1)), ("f", ()))
"""Workers of each stage, and their shares."""


def handle(name: str, link_address: str | None = None) -> Any:
    links = f"{name}:1" if link_address is None else link_address
    return SimpleNamespace(name=name, registration=SimpleNamespace(address=f"{name}:0", link_address=links))


def orders(without_links: str = "") -> list[Load]:
    stages = [
        StageInfo(name, place, place + 1, shares=shares, member=member)
        for place, (names, shares) in enumerate(CHAIN)
        for member, name in enumerate(names)
    ]
    handles = [handle(stage.worker, "" if stage.worker == without_links else None) for stage in stages]
    return load_orders(StageLoads(7, stages, ModelReference("m.gguf", "m"), LIMITS), handles, {}, {}, {})


def test_members_of_a_group_have_one_id_and_each_its_own_place() -> None:
    found = [order.group for order in orders()]
    assert [group is None for group in found] == [False, False, True, False, False, False, True]
    groups = [group for group in found if group is not None]
    assert [group.member for group in groups] == [0, 1, 0, 1, 2]
    assert [len({group.group_id for group in part}) for part in (groups, groups[:2], groups[2:])] == [2, 1, 1]
    told = [[(one.worker, one.address, one.share) for one in group.members] for group in groups]
    assert told == [[("a", "a:1", 1), ("b", "b:1", 2)]] * 2 + [[("d", "d:1", 3), ("e", "e:1", 1), ("a", "a:1", 1)]] * 3
    assert orders()[0].group != found[0], "ids are new for each epoch"


def test_leaders_have_the_chain() -> None:
    assert [order.next_worker for order in orders()] == ["c", None, "d", "f", None, None, None]
    assert [order.previous_worker for order in orders()] == [None, None, "a", "c", None, None, "d"]


@pytest.mark.parametrize("worker", "be")
def test_a_member_that_accepts_no_links_is_named(worker: str) -> None:
    with pytest.raises(WorkerError, match=f"worker {worker} cannot be in a group") as raised:
        orders(without_links=worker)
    assert str(raised.value).endswith("look at its log, or give it layers of its own in the plan")
    assert raised.value.worker == worker
