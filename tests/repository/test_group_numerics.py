"""Sums over k in blocks (benchmarks/groups/numerics.py): a tree has the same bits for any division; times."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.forked_commands import forked_script
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "groups"))
import sums
from links import missing
from numerics import GATHER_BYTES, message_cost, prompt_ms
from sums import Products, Way, block_borders, joined, subtrees, tree_sum
from token_model import MODELS, Link, Setting, estimate, products

SCRIPT = ROOT / "benchmarks" / "groups" / "numerics.py"
FREE = Link(latency_us=0.0, gbit_s=1e9, message_us=0.0, byte_us=0.0)


@pytest.mark.parametrize("blocks", [8, 16])
def test_a_tree_has_the_same_bits_for_any_division(blocks: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source, numbers = random.Random(seed), np.random.default_rng(seed)
    leaves = [
        (numbers.standard_normal(64) * 10 ** numbers.uniform(-6, 6, 64)).astype(np.float32) for _ in range(blocks)
    ]
    expected = tree_sum(leaves)
    for members in range(1, blocks + 1):
        cuts = [0, *sorted(source.sample(range(1, blocks), members - 1)), blocks]
        parts = {
            part: tree_sum(leaves[part.start : part.stop])
            for begin, end in pairwise(cuts)
            for part in subtrees(begin, end)
        }
        assert joined(parts, range(blocks)).tobytes() == expected.tobytes()
    chain = np.add.accumulate(np.stack(leaves), dtype=np.float32)[-1]
    assert chain.tobytes() != expected.tobytes()  # else any order would do


@pytest.mark.parametrize(
    ("begin", "end", "sizes"),
    [(0, 8, [8]), (0, 5, [4, 1]), (5, 8, [1, 2]), (3, 8, [1, 4]), (1, 7, [1, 2, 2, 1]), (2, 3, [1])],
)
def test_a_member_sends_a_sum_for_each_aligned_subtree(begin: int, end: int, sizes: list[int]) -> None:
    found = subtrees(begin, end)
    assert [len(part) for part in found] == sizes
    assert all(part.start % len(part) == 0 for part in found)
    assert [block for part in found for block in part] == [*range(begin, end)]


@pytest.mark.parametrize("columns", [256, 896, 2048, 2880, 4096, 14336, 28672])
@pytest.mark.parametrize("blocks", [8, 16])
def test_blocks_are_whole_256s_of_nearly_equal_size(columns: int, blocks: int) -> None:
    borders = block_borders(columns, blocks)
    assert (borders[0], borders[-1], len(borders)) == (0, columns, blocks + 1)
    assert all(border % 256 == 0 for border in borders[:-1])
    sizes = [-(-(end - begin) // 256) for begin, end in pairwise(borders)]
    assert max(sizes) - min(sizes) <= 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    return sums.build(tmp_path_factory.mktemp("sums"), "-O1")


@pytest.mark.parametrize("quant_type", sums.TYPES)
def test_products_in_blocks_are_trees_of_the_products_sums(library: Path, quant_type: QuantType) -> None:
    """A block's sum is the product with zeros elsewhere, which add nothing."""
    rows, columns = 80, 2304
    task = Products(library, quant_type, rows, columns)
    numbers = np.random.default_rng(7)
    for tokens in (1, 3, 8, 200):
        x = numbers.standard_normal((tokens, columns)).astype(np.float32)
        for blocks in (1, 8, 16):
            leaves = []
            for begin, end in pairwise(block_borders(columns, blocks)):
                masked = np.zeros_like(x)
                masked[:, begin:end] = x[:, begin:end]
                task.set_activations(masked)
                task.seconds(Way.CHAIN, 1, tokens)
                leaves.append(task.output(tokens))
            task.set_activations(x)
            task.seconds(Way.BLOCKS, blocks, tokens)
            assert task.output(tokens).tobytes() == tree_sum(leaves).tobytes()
    task.close()


def times_of(members: int, us_a_column: float = 1e-5) -> dict[str, float]:
    return {name: rows * cols * us_a_column for name, (rows, cols) in products(MODELS["8b"], members).items()}


@pytest.mark.parametrize("members", [2, 4, 8])
def test_without_a_network_all_divisions_gain_the_number_of_members(members: int) -> None:
    setting = Setting(MODELS["8b"], members, FREE, layer_us=0.0)
    found = estimate(setting, times_of(members), times_of(1))
    for time_us in (found.plain_rows_us, found.plain_columns_us, found.rows_us, found.blocks_us):
        assert found.one_us / time_us == pytest.approx(members, rel=1e-3)


def test_an_exchange_in_turn_costs_its_latency() -> None:
    setting = Setting(MODELS["8b"], 2, replace(FREE, latency_us=100.0), layer_us=0.0)
    found = estimate(setting, times_of(2, 1e-4), times_of(1, 1e-4))  # a product takes milliseconds
    computing, layers = found.one_us / 2, MODELS["8b"].layers
    assert found.plain_rows_us == pytest.approx(computing + (4 * layers + 1) * 100.0)
    assert found.plain_columns_us == pytest.approx(computing + (2 * layers + 1) * 100.0)


def test_pieces_in_the_order_of_k_hide_the_gathers_that_no_norm_follows() -> None:
    setting = Setting(MODELS["8b"], 2, replace(FREE, latency_us=100.0), layer_us=0.0)
    found = estimate(setting, times_of(2, 1e-4), times_of(1, 1e-4))
    computing, layers = found.one_us / 2, MODELS["8b"].layers
    assert found.rows_us == pytest.approx(computing + (2 * layers + 1) * 100.0)
    assert found.throughout_us == pytest.approx(computing + 100.0)


def test_columns_of_a_prompt_are_more_bytes() -> None:
    for members in (2, 4):
        (rows_ms, rows_sent), (columns_ms, columns_sent) = (
            prompt_ms(MODELS["70b"], members, 1.0, 100.0, by_columns=way) for way in (False, True)
        )
        assert rows_ms == columns_ms and columns_sent == pytest.approx(1.27 * rows_sent, rel=0.01)


def test_a_message_costs_half_of_a_gather_on_either_side() -> None:
    assert message_cost([10 + 1e-3 * size for size in GATHER_BYTES]) == pytest.approx((5.0, 5e-4))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = forked_script(SCRIPT, "--type", "IQ1_S", folder=tmp_path)
    assert done.returncode == 2 and "choose from Q4_K" in done.stderr.splitlines()[-1] and done.stdout == ""
