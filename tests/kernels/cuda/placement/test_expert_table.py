"""Tests of the choice of cached experts, and of the division of the cache's memory."""

from __future__ import annotations

import numpy as np
import pytest

from llamaclust.kernels.cuda.experts_cache.launches import LineInputs
from llamaclust.kernels.cuda.experts_cache.slots import SlotLayout, pools_bytes, slot_counts
from llamaclust.kernels.cuda.experts_cache.table import ExpertTable, Pool
from support.seed import SEED


def use(table: ExpertTable, mixture: int, *experts: int) -> list[int]:
    found: list[int] = table.use(mixture, np.array([experts], np.int32))[0].tolist()
    return found


def bring(table: ExpertTable) -> list[tuple[int, int]]:
    """Completes all wanted copies and returns their mixtures and experts in order."""
    brought = []
    while (copy := table.next_copy()) is not None:
        brought.append((copy.mixture, copy.expert))
        table.complete()
    return brought


def test_the_most_used_come_first() -> None:
    table = ExpertTable([Pool((0, 1), 2)], 4)
    for mixture, experts in ((0, (0, 1)), (1, (2, 3)), (0, (1, 2)), (1, (2, 0)), (0, (1, 3))):
        assert use(table, mixture, *experts) == [-1, -1]
        table.end_step()
    assert bring(table) == [(0, 1), (1, 2)]
    assert use(table, 0, 0, 1)[0] == -1 and use(table, 0, 1) == [0] and use(table, 1, 2) == [1]
    assert (table.hits, table.misses) == (3, 11)


def test_another_one_comes_when_it_is_used_more_by_a_use_of_now() -> None:
    """The cache first replaces an expert without recent uses."""
    table = ExpertTable([Pool((0,), 2)], 8)
    for expert in (0, 0, 1, 1, 1):
        use(table, 0, expert)
        table.end_step()
    assert bring(table) == [(0, 1), (0, 0)]
    brought = []
    for _ in range(4):
        use(table, 0, 5)
        table.end_step()
        brought.append(bring(table))
    assert brought == [[], [], [(0, 5)], []], "three uses of late are worth two of before and one of now"
    assert use(table, 0, 0) == [-1] and use(table, 0, 5, 1) == [1, 0]


def test_uses_of_long_ago_count_less() -> None:
    """Uses count half as much after 256 steps, and sums stay finite."""
    table = ExpertTable([Pool((0,), 1)], 4)
    for _ in range(100):
        use(table, 0, 0)
        table.end_step()
    assert bring(table) == [(0, 0)]
    for _ in range(256 * 400):
        table.end_step()
    use(table, 0, 2)
    table.end_step()
    assert bring(table) == [], "of nothing and a use of now, none is clearly more"
    use(table, 0, 2)
    assert bring(table) == [(0, 2)]
    use(table, 0, 0)
    use(table, 0, 0)
    assert bring(table) == [], "two uses against two and one of now"


def test_an_expert_that_the_step_uses_stays() -> None:
    table = ExpertTable([Pool((0,), 1)], 4)
    use(table, 0, 0)
    table.end_step()
    assert bring(table) == [(0, 0)]
    assert use(table, 0, 0) == [0]
    for _ in range(9):
        use(table, 0, 3)
    assert bring(table) == []
    table.end_step()
    assert bring(table) == [(0, 3)]


def test_random_uses() -> None:
    """Each slot holds one expert, and no expert has two slots; copies take no slot in use; pools share no experts."""
    random = np.random.default_rng(SEED)
    pools = [Pool((0, 2), 3), Pool((1,), 5), Pool((3,), 0)]
    table, there = ExpertTable(pools, 8), dict[tuple[int, int], tuple[int, int]]()
    copying = None
    for _ in range(2000):
        in_use = set()
        for mixture in range(4):
            pool = next(index for index, pool in enumerate(pools) if mixture in pool.mixtures)
            experts = random.choice(8, 3, replace=False, p=np.arange(1, 9) / 36).tolist()
            for expert, slot in zip(experts, use(table, mixture, *experts), strict=True):
                assert slot == there.get((mixture, expert), (pool, -1))[1]
                if slot >= 0:
                    in_use.add((pool, slot))
            if copying is None and random.random() < 0.4 and (copying := table.next_copy()) is not None:
                place = copying.pool, copying.slot
                assert copying.mixture in pools[copying.pool].mixtures and copying.slot < pools[copying.pool].slots
                assert place not in in_use and (copying.mixture, copying.expert) not in there
                there = {expert: slot for expert, slot in there.items() if slot != place}
            elif copying is not None and random.random() < 0.3:
                table.complete()
                there[copying.mixture, copying.expert] = copying.pool, copying.slot
                copying = None
        table.end_step()
        held = [sum(1 for pool, _ in there.values() if pool == index) for index in range(3)]
        assert table.held == held
    assert table.hits > 1000 and held[1:] != [0, 0]


LAYOUTS = SlotLayout((1024, 1024, 2048), (96, 96, 64)), SlotLayout((1024, 1024, 1536), ()), SlotLayout((512, 512), ())


@pytest.mark.parametrize("count", [1, 7, 128])
def test_shares_of_pools(count: int) -> None:
    """Shares are exact to the byte: all slots fit, and one more slot of any pool would not."""
    random = np.random.default_rng(SEED)
    experts = {layout: count * (index + 1) for index, layout in enumerate(LAYOUTS)}
    most = pools_bytes(experts)
    for n_bytes in (0, 1, *random.integers(0, most, 20).tolist(), most - 1, most, 2 * most):
        counts = slot_counts(experts, n_bytes)
        assert pools_bytes(counts) <= n_bytes
        for layout, slots in counts.items():
            assert 0 <= slots <= experts[layout]
            more = pools_bytes({**counts, layout: slots + 1})
            assert slots == experts[layout] or more > n_bytes
    assert slot_counts(experts, most) == experts


def test_places_of_slots_do_not_overlap() -> None:
    layout, slots = LAYOUTS[0], 5
    taken = np.zeros(layout.pool_bytes(slots), np.int32)
    for slot in range(slots):
        for place, size in zip(layout.places(slots, slot), (*layout.matrix_bytes, *layout.bias_bytes), strict=True):
            taken[place : place + size] += 1
    assert taken.max() == 1 and taken.sum() == slots * layout.expert_bytes


def test_numbers_of_lines() -> None:
    """Lines of cached experts are sorted by slot and divided into pieces; every line has the place of its result."""
    inputs, slots = LineInputs(12), np.array([[3, -1, 0], [3, 0, -1], [5, 3, 3]], np.int32)
    pinned = np.full(inputs.offsets[-1], 0xFF, np.uint8)
    weights = np.arange(9, dtype=np.float32).reshape(3, 3)
    inputs.fill(pinned, weights, slots, piece=3)
    at_weights, at_lines, at_items, at_sources, _ = inputs.offsets
    assert pinned[:12].view(np.int32).tolist() == [3, 9, 4]
    assert pinned[at_weights:][:36].view(np.float32).tolist() == list(range(9))
    assert pinned[at_lines:][:28].view(np.int32).tolist() == [2, 4, 0, 3, 7, 8, 6]
    assert pinned[at_items:][:48].view(np.int32).reshape(4, 3).tolist() == [[0, 0, 2], [3, 2, 3], [3, 5, 1], [5, 6, 1]]
    assert pinned[at_sources:][:36].view(np.int32).tolist() == [0, 12, 2, 3, 4, 13, 6, 7, 8]
