from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from llamaclust.cluster.scheduler.kv import prefix_cache
from llamaclust.cluster.scheduler.kv.blocks import BlockTable, KvBlocks
from llamaclust.cluster.scheduler.kv.memory import KvMemory
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys, PrefixCache
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.usage import Usage
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.clusters.fakes import VOCABULARY
from support.plans.simulations import check_answer, check_writes, generation, simulation
from support.seed import SEED

_TOKENS = 9 * KV_BLOCK_TOKENS + 5


def test_blocks_are_allocated_from_low_ids_and_released() -> None:
    blocks = KvBlocks(4)
    taken = [blocks.take() for _ in range(3)]
    assert taken == [0, 1, 2] and (blocks.available, blocks.held) == (1, 3)
    blocks.release(taken)
    assert [blocks.take() for _ in range(4)] == [0, 1, 2, 3], "runs stay runs"
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release([1, 1])


def test_labelled_blocks_stay_until_they_are_needed() -> None:
    blocks = KvBlocks(3)
    a, b = blocks.take(), blocks.take()
    blocks.register(a, b"a")
    blocks.register(b, b"b")
    assert blocks.acquire(b"a") == a and blocks.holders(a) == 2
    blocks.release([a, b])
    blocks.release([a])
    assert blocks.available == 3
    assert (blocks.is_idle(b"a"), blocks.is_idle(b"c")) == (True, None)
    assert blocks.take() == 2, "a free block goes first"
    assert blocks.take() == b, "then the one that is idle for longest"
    assert blocks.is_idle(b"b") is None
    assert blocks.acquire(b"a") == a and blocks.is_idle(b"a") is False
    assert blocks.available == 0


def test_the_first_block_with_a_content_keeps_its_key() -> None:
    blocks = KvBlocks(2)
    a, b = blocks.take(), blocks.take()
    blocks.register(a, b"same")
    blocks.register(b, b"same")
    blocks.release([a, b])
    assert blocks.acquire(b"same") == a
    assert blocks.take() == b
    assert blocks.available == 0


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_right_whatever_happens(seed: int) -> None:
    random_ = random.Random(seed)
    blocks = KvBlocks(random_.randint(1, 12))
    holds: list[int] = []
    keys: list[bytes] = []
    for step in range(400):
        action = random_.random()
        if action < 0.4 and blocks.available:
            holds.append(blocks.take())
        elif action < 0.6 and holds:
            key = str(step).encode()
            blocks.register(random_.choice(holds), key)
            keys.append(key)
        elif action < 0.7 and keys and blocks.is_idle(key := random_.choice(keys)) is not None:
            holds.append(blocks.acquire(key))
        elif holds:
            blocks.release([holds.pop(random_.randrange(len(holds)))])
        counts = Counter(holds)
        assert blocks.held == len(counts)
        assert all(blocks.holders(block) == counts[block] for block in range(blocks.count))
    blocks.release(holds)
    assert sorted(blocks.take() for _ in range(blocks.count)) == list(range(blocks.count))


def test_a_sequence_has_room_exactly_if_the_blocks_that_others_release_suffice() -> None:
    print(f"seed {SEED}")
    random_, found = random.Random(SEED), Counter[bool]()
    for _ in range(500):
        memory = KvMemory(SchedulerSettings("m", VOCABULARY, 400, kv_blocks=random_.randint(20, 40)))
        running: list[Sequence] = []
        for key in range(8):
            length = random_.randint(20, 300)
            prompt = (random_.randrange(2),) * (length // 2) + (random_.randrange(2, 4),) * length
            sequence = Sequence(key, GenerationRequest("r", prompt, 10), 10, Usage(0))
            if key < 7 and memory.admit(sequence, 0):
                sequence.scheduled = length
                memory.filled(sequence)
                memory.begin_microbatch()
                running.append(sequence)
        for ended in random_.sample(running, random_.randrange(len(running) + 1)):
            running.remove(ended)
            memory.release(ended)
        others, reserve = random_.sample(running, random_.randrange(len(running) + 1)), random_.randrange(4)
        suffices = memory.suffices_without(others, sequence, reserve)
        for other in others:
            memory.release(other)
        assert memory.admit(sequence, reserve) is suffices
        found[suffices] += 1
    assert min(found[True], found[False]) > 50, found


def test_a_refused_sequence_has_room_although_another_took_its_cached_blocks() -> None:
    memory, shared = KvMemory(SchedulerSettings("m", VOCABULARY, 2000, kv_blocks=100)), (1,) * 40 * KV_BLOCK_TOKENS

    def sequence(key: int, prompt: tuple[int, ...]) -> Sequence:
        return Sequence(key, GenerationRequest("r", prompt, 10), 10, Usage(0))

    first, other = sequence(0, shared), sequence(1, (2,) * 340)
    assert memory.admit(first, 0)
    first.scheduled = len(shared)
    memory.filled(first)
    memory.release(first)
    memory.begin_microbatch()
    assert memory.admit(other, 0)
    refused, same = sequence(2, (*shared, *(3,) * 660)), sequence(3, (*shared, *(4,) * 40))
    assert memory.lacks_blocks(refused, 0)
    assert memory.admit(same, 0)
    memory.release(other)
    assert not memory.lacks_blocks(refused, 0)


def test_tables_are_runs() -> None:
    table = BlockTable()
    for block in (5, 6, 7, 2, 3, 9):
        table.append(block)
    assert table.runs == (5, 3, 2, 2, 9, 1)
    table.append(10)
    assert table.runs == (5, 3, 2, 2, 9, 2)
    assert table.clear() == [5, 6, 7, 2, 3, 9, 10]
    assert len(table.runs) == len(table) == 0


def filled(cache: PrefixCache, blocks: KvBlocks, tokens: list[int]) -> list[int]:
    table = [blocks.take() for _ in range(len(tokens) // KV_BLOCK_TOKENS)]
    cache.register(BlockKeys(), tokens, table, 0, len(table))
    return table


def test_the_longest_equal_beginning_is_found() -> None:
    blocks = KvBlocks(20)
    cache = PrefixCache(blocks, "model", KvType.F16)
    tokens = list(range(100))
    table = filled(cache, blocks, tokens)
    assert cache.find(BlockKeys(), tokens, 99) == (6, 0)
    assert cache.find(BlockKeys(), tokens, 96) == (6, 0)
    assert cache.find(BlockKeys(), tokens, 95) == (5, 0)
    assert cache.find(BlockKeys(), [*tokens[:40], 7, *tokens[41:]], 99) == (2, 0)
    assert cache.find(BlockKeys(), [7, *tokens[1:]], 99) == (0, 0)
    assert cache.find(BlockKeys(), tokens[16:], 80) == (0, 0), "the same tokens elsewhere are something else"
    blocks.release(table)
    assert cache.find(BlockKeys(), tokens, 99) == (6, 6)


def test_another_model_kv_type_or_salt_shares_nothing() -> None:
    blocks = KvBlocks(20)
    tokens = list(range(64))
    filled(PrefixCache(blocks, "model", KvType.F16), blocks, tokens)
    assert PrefixCache(blocks, "model", KvType.F16).find(BlockKeys(), tokens, 64) == (4, 0)
    assert PrefixCache(blocks, "other", KvType.F16).find(BlockKeys(), tokens, 64) == (0, 0)
    assert PrefixCache(blocks, "model", KvType.F16).find(BlockKeys("mine"), tokens, 64) == (0, 0)
    assert PrefixCache(blocks, "model", KvType.Q8_0).find(BlockKeys(), tokens, 64) == (0, 0)
    assert PrefixCache(blocks, "model", KvType.F16, enabled=False).find(BlockKeys(), tokens, 64) == (0, 0)


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Returns the list of all data that the prefix cache hashes."""
    hashed: list[bytes] = []

    def hash_and_count(data: bytes) -> Any:
        hashed.append(data)
        return sha256(data)

    monkeypatch.setattr(prefix_cache, "sha256", hash_and_count)
    return hashed


@pytest.mark.parametrize(
    ("others_come", "times"), [("together", 1), ("after the prompt", 1), ("after the first answer", 2)]
)
def test_the_keys_of_a_prompt_are_computed_once(others_come: str, times: int, hashes: list[bytes]) -> None:
    run = simulation()
    check_writes(run)
    request = generation(_TOKENS, 5)
    first, *others = [replace(request, choice=choice, seed=choice) for choice in range(5)]
    keys = [run.add(first)]
    if others_come == "after the prompt":
        while not run.rows(keys[0]):
            run.step()
    elif others_come == "after the first answer":
        run.finish()
    keys += [run.add(other) for other in others]
    run.finish()
    for key, request in zip(keys, (first, *others), strict=True):
        check_answer(run, key, request)
    of_blocks = [data for data in hashes if len(data) == 32 + 4 * KV_BLOCK_TOKENS]
    assert len(of_blocks) == times * (_TOKENS // KV_BLOCK_TOKENS)


@pytest.mark.parametrize("seed", range(10))
def test_shared_keys_are_those_of_separate_sequences(seed: int) -> None:
    random_ = random.Random(seed)
    cache = PrefixCache(KvBlocks(1), "m", KvType.F16)
    prompt = [random_.randrange(100) for _ in range(_TOKENS)]
    answered = [[*prompt, *(random_.randrange(100) for _ in range(100))] for _ in range(4)]
    keys = [BlockKeys("salt")]
    for _ in range(40):
        if len(keys) < len(answered) and random_.random() < 0.2:
            keys.append(random_.choice(keys).shared(_TOKENS // KV_BLOCK_TOKENS))
        number = random_.randrange(len(keys))
        cache.find(keys[number], answered[number], random_.randrange(len(answered[number])))
    for own, tokens in zip(keys, answered, strict=False):
        cache.find(own, tokens, len(tokens))
        cache.find(alone := BlockKeys("salt"), tokens, len(tokens))
        assert own == alone
    assert len(keys) > 1 and len({tuple(own) for own in keys}) == len(keys)
