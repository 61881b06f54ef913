"""Tests of links in plans: what measurements say of all links, and which splits they improve."""

from __future__ import annotations

import asyncio
import contextlib
import random
import stat
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from llamaclust.cluster.control.resources.link_profiling import _keys, _link, _places, _wanted, measure_links
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.links import COORDINATOR, NO_REACH, USUAL, Link, Links
from llamaclust.cluster.planner.memory import PlanRequest
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.cluster.state.measurements import newest
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from llamaclust.wire.control.messages import Register
from llamaclust.wire.control.profiles import LinkProfile
from llamaclust.wire.rpc.link_probe import PING_BYTES
from support.clusters.real_cluster import real_cluster
from support.plans.plan_inputs import link as link_ms
from support.plans.plan_inputs import profile
from support.plans.plan_inputs import reach as reach_ms
from support.wire.control_messages import REGISTER

MODEL = ModelCosts(20 * MIB, 20 * MIB, 30_000_000, (LayerCost(10 * MIB, 20_000_000, 4096),) * 12, hidden_bytes=16_384)


def made(links: Links, names: str, memory_mib: int = 10_000, objective: str = "latency") -> Plan:
    reaches = links.reaches(names)
    workers = [WorkerFacts(name, memory_mib * MIB, profile(), 1, reaches[name]) for name in names]
    measure = PlanRequest(1024, 8, lambda place: MIB, objective=objective, links=links)
    return make_plan(MODEL, workers, measure)


def star(reach: dict[str, Link]) -> Links:
    """Returns links whose times are sums over both ends."""
    return Links(
        {
            frozenset((one, other)): Link(
                reach[one].one_way_s + reach[other].one_way_s, reach[one].byte_s + reach[other].byte_s
            )
            for one, other in combinations(reach, 2)
        }
    )


@pytest.mark.parametrize("count", [3, 5, 8])
def test_links_that_add_up_are_taken_apart(count: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    random_ = random.Random(seed)
    reach = {
        f"w{i}": reach_ms(0.2 * 1.3 ** random_.randint(0, 20), 0.2 * 1.3 ** random_.randint(0, 20))
        for i in range(count)
    }
    found = star(reach).reaches(list(reach))
    for name, one in reach.items():
        assert found[name].one_way_s == pytest.approx(one.one_way_s, abs=1e-9)
        assert found[name].byte_s == pytest.approx(one.byte_s, abs=1e-15)


def test_nothing_measured_adds_nothing() -> None:
    assert Links().reaches("ab") == {"a": NO_REACH, "b": NO_REACH}
    assert Links().between("a", "b") == USUAL


def test_noise_keeps_workers_alike() -> None:
    noisy = Links({frozenset(pair): link_ms(0.15 + 0.004 * i, 1.0) for i, pair in enumerate(combinations("abcd", 2))})
    assert len(set(noisy.reaches("abcd").values())) == 1


def test_a_token_goes_round_and_one_stage_has_no_link() -> None:
    links = star({"a": reach_ms(1.0), "b": reach_ms(2.0), "c": reach_ms(4.0), COORDINATOR: reach_ms(8.0)})
    assert [link.one_way_s for link in links.round(["a", "b", "c"])] == pytest.approx([3e-3, 6e-3, 5e-3])
    assert list(links.round(["a"])) == []


def test_a_worker_that_is_far_away_stays_a_spare() -> None:
    near = {"a": reach_ms(0.1), "b": reach_ms(0.1), COORDINATOR: reach_ms(0.1)}
    plan = made(star({**near, "c": reach_ms(20.0)}), "abc")
    assert {stage.worker for stage in plan.stages} == {"a", "b"}
    assert [idle.worker for idle in plan.idle_workers] == ["c"]
    plan = made(star({**near, "c": reach_ms(0.1)}), "abc")
    assert len(plan.stages) == 3


def test_memory_brings_it_in_and_the_prediction_says_what_that_costs() -> None:
    far = star({"a": reach_ms(0.1), "b": reach_ms(20.0), COORDINATOR: reach_ms(0.1)})
    plan = made(far, "ab", memory_mib=130)
    assert len(plan.stages) == 2 and plan.prediction is not None
    near = made(star({"a": reach_ms(0.1), "b": reach_ms(0.1), COORDINATOR: reach_ms(0.1)}), "ab", memory_mib=130)
    assert near.prediction is not None
    assert plan.prediction.token_s - near.prediction.token_s == pytest.approx(2 * 20.1e-3 - 2 * 0.2e-3)
    assert plan.prediction.ttft_s - near.prediction.ttft_s == pytest.approx(2 * 19.9e-3)


def test_a_slow_link_makes_prompts_take_longer() -> None:
    slow = made(
        star({"a": reach_ms(0.1, 10.0), "b": reach_ms(0.1, 70.0), COORDINATOR: reach_ms(0.1)}), "ab", memory_mib=130
    )
    fast = made(
        star({"a": reach_ms(0.1, 0.5), "b": reach_ms(0.1, 0.5), COORDINATOR: reach_ms(0.1)}), "ab", memory_mib=130
    )
    assert slow.prediction is not None and fast.prediction is not None
    sent_s = 512 * 16_384 * 80e-9
    assert slow.prediction.ttft_s > sent_s
    token_s = slow.prediction.token_s - fast.prediction.token_s
    assert token_s == pytest.approx(16_384 * 79e-9), "the hidden state goes there, a token id comes back"
    assert slow.prediction.links_s - fast.prediction.links_s == pytest.approx(token_s)


def test_links_that_were_not_measured_are_sums_of_what_their_ends_add() -> None:
    ends = {"a": reach_ms(1.0), "b": reach_ms(2.0), "c": reach_ms(4.0), COORDINATOR: reach_ms(8.0)}
    whole = star(ends)
    measured = {pair: link for pair, link in whole.measured.items() if pair != frozenset("ac")}
    links = Links(measured).estimated([frozenset("ac"), frozenset("ax")])
    assert links.measured.keys() == whole.measured.keys(), "nothing is known of x"
    assert links.between("a", "c").one_way_s == pytest.approx(whole.between("a", "c").one_way_s)
    assert all(links.measured[pair] == measured[pair] for pair in measured)


def test_bytes_of_a_ping_are_no_latency() -> None:
    link = _link(LinkProfile(2e-3 + PING_BYTES * 8e-7, 1 / 8e-7))
    assert [link.one_way_s, link.byte_s] == pytest.approx([1e-3, 8e-7])
    assert _link(LinkProfile(1e-3, 1e6)).one_way_s == 0.0


# -- measured ----------------------------------------------------------------------------------------------------------


def test_links_are_measured_once_between_machines_that_are_alike(tmp_path: Path) -> None:
    told: list[object] = []

    async def run() -> tuple[Links, Links]:
        async with real_cluster(tmp_path, 3) as cluster:
            measure = partial(measure_links, cluster.registry.present, cluster.run.token, tmp_path, told.append)
            first = await measure()
            for name in ("a", "b", "c"):
                cluster.registry.workers[name].channel.send = silent
            return first, await measure()  # no link is probed

    async def silent(_: object) -> None:
        raise AssertionError("asked again")

    first, second = asyncio.run(run())
    assert first == second and not told
    ends = [COORDINATOR, "a", "b", "c"]
    assert set(first.measured) == {frozenset(pair) for pair in combinations(ends, 2)}
    assert all(0 <= link.one_way_s < 0.1 and 0 < link.byte_s < 1e-4 for link in first.measured.values())
    among = {link for pair, link in first.measured.items() if COORDINATOR not in pair}
    assert len(among) == 1, "on one machine, one pair of workers stands for all"
    assert stat.S_IMODE((tmp_path / ".links.json").stat().st_mode) == 0o600


def test_a_link_that_is_cut_is_told_and_unknown(tmp_path: Path) -> None:
    told: list[Event] = []

    async def run() -> Links:
        async with real_cluster(tmp_path, 2) as cluster:
            a, b = (cluster.registry.workers[name] for name in "ab")
            b.registration = replace(b.registration, address=f"unix:{tmp_path}/absent.sock")
            return await measure_links({"a": a, "b": b}, cluster.run.token, tmp_path, told.append)

    links = asyncio.run(run())
    assert frozenset("ab") not in links.measured and frozenset((COORDINATOR, "a")) in links.measured
    texts = [event.text for event in told if isinstance(event, Notice)]
    assert any("between a and b" in text and "no connection to worker b at unix:" in text for text in texts)


def test_a_worker_that_other_machines_cannot_reach_is_told(tmp_path: Path) -> None:
    told: list[Event] = []

    async def run() -> None:
        async with real_cluster(tmp_path, 2) as cluster:
            workers = {name: cluster.registry.workers[name] for name in "ab"}
            for address in ("127.0.0.1:1", "[::1]:2"):
                workers["a"].registration = replace(workers["a"].registration, address=address)
                for other in ("127.0.0.1:3", "192.0.2.7:3"):
                    workers["b"].registration = replace(workers["b"].registration, address=other)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.01):  # reported before any measurement
                            await measure_links(workers, cluster.run.token, tmp_path, told.append)

    asyncio.run(run())
    texts = [event.text for event in told if isinstance(event, Notice) and "no other machine" in event.text]
    assert [text.partition(",")[0] for text in texts] == [
        "worker a listens at 127.0.0.1:1",
        "worker a listens at [::1]:2",
    ]


def registered(*workers: tuple[str, str, str, str]) -> dict[str, Register]:
    return {
        name: replace(REGISTER, name=name, machine=machine, host=host, address=address)
        for name, machine, host, address in workers
    }


def test_links_belong_to_machines_and_not_to_addresses() -> None:
    first = _places(registered(("a", "boot 1", "pod-0", "10.0.0.1:7"), ("b", "boot 1", "pod-1", "10.0.0.2:7")))
    later = _places(registered(("x", "boot 1", "pod-0", "10.0.9.9:7"), ("y", "boot 1", "pod-1", "10.0.9.8:7")))
    assert [*first.values()] == [*later.values()] and first["a"] != first["b"]
    same_name = _places(registered(("a", "boot 1", "debian", "10.0.0.1:7"), ("b", "boot 2", "debian", "10.0.0.2:7")))
    assert same_name["a"] != same_name["b"]
    several = _places(registered(("a", "boot 1", "host", "10.0.0.1:7"), ("b", "boot 1", "host", "10.1.0.1:7")))
    assert several["a"] != several["b"], "a machine on two networks"
    here = _places(registered(("a", "boot 1", "host", "unix:/x/a"), ("b", "boot 1", "host", "unix:/x/b")))
    assert here["a"] == here["b"] != first["a"]


def test_of_many_machines_neighbours_and_the_coordinators_links_are_measured() -> None:
    names = [f"w{index:02}" for index in range(40)]
    few, many = ({name: f"machine {name}" for name in names[:count]} for count in (16, 40))
    assert _wanted(_keys(few), names[:16]) == [*_keys(few)]
    wanted = _wanted(_keys(many), names)
    assert len(wanted) == 80 and ("w03", "w04") in wanted and ("w00", "w39") in wanted
    assert len(_wanted(_keys(dict.fromkeys(names, "one machine")), names)) == 820, "two of them are measured"


def test_links_of_machines_that_have_gone_are_forgotten() -> None:
    known = dict.fromkeys("abcd", USUAL)
    assert [*newest(known, "ax", 3)] == ["c", "d", "a"]
    assert [*newest(known, "abcd", 3)] == [*"abcd"], "those in use stay"


def test_a_damaged_file_of_links_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / ".links.json").write_text('{"x": [1]}')

    async def run() -> Links:
        async with real_cluster(tmp_path, 1) as cluster:
            return await measure_links(cluster.registry.present, cluster.run.token, tmp_path, lambda event: None)

    assert len(asyncio.run(run()).measured) == 1
