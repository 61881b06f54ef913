"""Tests of KV memory on disk: restarted clusters give the ids and bits of one undisturbed worker, whether a prompt is
computed, read from disk, or damaged on disk."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.coordinator import open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import UsageError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.clusters.recovering import Answer, answer_of
from support.damaged_models import flip_middle
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

CONTEXT = 1024
PROMPT, SECOND = 600, 590  # More than a span.
SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", hidden=64, heads=4, ffn=96, context=CONTEXT)


def generations(salt: str = "") -> tuple[GenerationRequest, ...]:
    """Returns requests with a long prompt, and with another prompt that has the same prefix."""
    source = Random(5)
    first = tuple(source.randrange(3, 320) for _ in range(PROMPT))
    second = (*first[:400], *(source.randrange(3, 320) for _ in range(SECOND - 400)))
    return (
        GenerationRequest("long", first, 10, SEEDED, seed=3, cache_salt=salt),
        GenerationRequest("other", second, 10, cache_salt=salt),
    )


@cache
def undisturbed(model: Path, kv_type: KvType = KvType.F16) -> list[Answer]:
    async def run() -> list[Answer]:
        client = LocalClient(model, threads=1, settings=LocalSettings(context_length=CONTEXT, kv_type=kv_type))
        async with client._stage.serve() as service:
            return [await answer_of(service._engine.submit(generation)) for generation in generations()]

    return asyncio.run(run())


@dataclass(frozen=True, slots=True)
class Ran:
    """The answers of a cluster, and the numbers of prompt tokens that it read and computed."""

    answers: list[Answer]
    cached: int
    computed: int


@dataclass(frozen=True, slots=True)
class Start:
    """Starts clusters of a model that share a cache folder."""

    model: Path
    folder: Path

    def run(self, cut: tuple[int, ...], *, kv_type: KvType = KvType.F16, salt: str = "", size: str = "1GiB") -> Ran:
        """Starts a cluster, and stops it when all KV memory is written."""
        return asyncio.run(self._run(cut, kv_type, salt, size))

    async def _run(self, cut: tuple[int, ...], kv_type: KvType, salt: str, size: str) -> Ran:
        facts = f"threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300, kv_disk: {size}"
        stages = [(f"w{index}", bounds) for index, bounds in enumerate(pairwise(cut))]
        overrides = [
            f"model={self.model}",
            "workers=[" + ", ".join(f"{{name: {name}, {facts}}}" for name, _ in stages) + "]",
            "plan=[" + ", ".join(f"{{worker: {name}, layers: [{a}, {b}]}}" for name, (a, b) in stages) + "]",
            f"context_length={CONTEXT}",
            f"kv_type={kv_type}",
        ]
        directory = ClusterDir(self.folder / "cluster")
        directory.create()
        config = load_config(None, overrides)
        async with asyncio.timeout(DEADLINE_S), open_cluster(config, [self.model], directory) as cluster:
            engine = cluster.engine
            answers = [await answer_of(engine.submit(generation)) for generation in generations(salt)]
            await engine._lane.kv_disk._saves.join()
            counts = engine.scheduler.counts
            return Ran(answers, counts.cached_tokens, counts.computed_tokens)

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "home" / "kv").glob("*.kv"))


@pytest.fixture
def start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path / "home"))
    return Start(model, tmp_path)


READ = (PROMPT - 1) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
SHARED = 400 // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
SECOND_READ = (SECOND - 1) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
COLD = PROMPT + SECOND - SHARED
WARM = PROMPT - READ + SECOND - SECOND_READ


@pytest.mark.parametrize(
    ("cut", "then"),
    [((0, 3, 6), (0, 3, 6)), ((0, 1, 3, 6), (0, 2, 6)), ((0, 6), (0, 2, 4, 6))],
    ids=str,
)
def test_prompts_are_read_after_a_restart_of_everything(
    start: Start, cut: tuple[int, ...], then: tuple[int, ...]
) -> None:
    expected = undisturbed(start.model)
    cold = start.run(cut)
    assert (cold.answers, cold.cached, cold.computed) == (expected, SHARED, COLD)
    warm = start.run(then)
    assert (warm.answers, warm.cached, warm.computed) == (expected, READ + SECOND_READ, WARM)


def test_kv_types_and_salts_share_nothing(start: Start) -> None:
    expected = undisturbed(start.model, KvType.Q8_0)
    start.run((0, 6), salt="a")
    cold, warm = Ran(expected, SHARED, COLD), Ran(expected, READ + SECOND_READ, WARM)
    assert start.run((0, 6), kv_type=KvType.Q8_0, salt="a") == cold
    assert start.run((0, 6), kv_type=KvType.Q8_0, salt="b") == cold
    assert start.run((0, 6), kv_type=KvType.Q8_0, salt="a") == warm


def test_a_flipped_byte_is_noticed_and_computed_again(start: Start) -> None:
    """Blocks before the damaged one are read. The damaged one is written again."""
    expected = undisturbed(start.model)
    start.run((0, 3, 6))
    path = Random(1).choice(start.files)
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 0x10
    path.write_bytes(data)
    damaged = start.run((0, 3, 6))
    assert damaged.answers == expected
    assert WARM < damaged.computed < COLD
    assert start.run((0, 3, 6)) == Ran(expected, READ + SECOND_READ, WARM)


DAMAGED = {
    "of the embedding": ("token_embd.weight", (0, 6), (0, 6)),
    "on the worker before": ("blk.1.attn_k.weight", (0, 3, 6), (0, 3, 6)),
    "of a norm": ("blk.4.ffn_norm.weight", (0, 3, 6), (0, 6)),
    "of a feed-forward matrix": ("blk.2.ffn_down.weight", (0, 6), (0, 2, 4, 6)),
}


@pytest.mark.parametrize(("tensor", "cut", "then"), DAMAGED.values(), ids=DAMAGED)
def test_nothing_is_read_that_a_damaged_file_computed(
    start: Start, tmp_path: Path, tensor: str, cut: tuple[int, ...], then: tuple[int, ...]
) -> None:
    """The damage does not change the model id. The repair restores the modification time."""
    expected = undisturbed(start.model)
    copy = shutil.copyfile(start.model, tmp_path / "copy.gguf")
    start = replace(start, model=copy)
    good = copy.stat()
    flip_middle(copy, tensor)
    os.utime(copy, ns=(good.st_atime_ns, good.st_mtime_ns))
    assert start.run(cut).answers != expected
    flip_middle(copy, tensor)
    os.utime(copy, ns=(good.st_atime_ns, good.st_mtime_ns))
    assert start.run(then) == Ran(expected, SHARED, COLD)
    assert start.run(cut) == Ran(expected, READ + SECOND_READ, WARM)


def test_copies_of_the_same_bytes_share_blocks(start: Start, tmp_path: Path) -> None:
    expected = undisturbed(start.model)
    start.run((0, 3, 6))
    copy = shutil.copyfile(start.model, tmp_path / "other name.gguf")
    assert replace(start, model=copy).run((0, 6)) == Ran(expected, READ + SECOND_READ, WARM)


def test_the_bound_holds_and_answers_stay(start: Start) -> None:
    assert start.run((0, 3, 6), size="300KiB").answers == undisturbed(start.model)
    assert 0 < sum(path.stat().st_size for path in start.files) <= 300 << 10


def test_models_with_a_window_are_refused(tmp_path: Path, start: Start) -> None:
    windowed = build_tiny_model(
        tmp_path / "window.gguf",
        hidden=64,
        heads=4,
        ffn=96,
        context=CONTEXT,
        extra={"llama.attention.sliding_window": 64},
    )
    with pytest.raises(UsageError, match=r"kv_disk: .* a window \(64 tokens\) is not kept on disk"):
        replace(start, model=windowed).run((0, 6))


def test_models_with_states_are_refused(tmp_path: Path, start: Start) -> None:
    model = build_architecture(tmp_path / "lfm2.gguf", "lfm2")
    with pytest.raises(UsageError, match="kv_disk: recurrent states of sequences are not kept on disk"):
        replace(start, model=model).run((0, 5))
