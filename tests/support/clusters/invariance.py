"""Runs the same requests in many ways; token ids and logprob bits must equal those of one undisturbed worker."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, pairwise
from math import ceil
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptEmbedded, PromptScored, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.sampler.params import PLAIN_ORDER, SAMPLERS, SamplerChain, SamplerName, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.groups.portions import borders
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.plans.drafting import draft

Answer = tuple[tuple[int, bytes], ...]
"""Pairs (token id, the four bytes of its float32 logprob) of scored prompt tokens, then of generated tokens; for a
request for hidden states, pairs (position, bytes of its hidden state)."""

_DEADLINE_S = 240.0
_OWN = 4
_SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.1)
_CHAINS = (
    SamplerChain(SAMPLERS, mirostat=1, mirostat_tau=3.0),
    SamplerChain((SamplerName.TEMPERATURE,), mirostat=2, mirostat_tau=4.0),
    SamplerChain((SamplerName.DRY, *PLAIN_ORDER), dry_multiplier=5.0, dry_allowed_length=1),
    SamplerChain(
        (SamplerName.TOP_K, SamplerName.XTC, SamplerName.TEMPERATURE), xtc_probability=0.5, xtc_threshold=0.01
    ),
    SamplerChain((SamplerName.TYPICAL_P, SamplerName.TEMPERATURE), typical_p=0.7, dynatemp_range=0.5),
    SamplerChain((SamplerName.TEMPERATURE, SamplerName.TOP_N_SIGMA), top_n_sigma=1.5),
    SamplerChain((SamplerName.TFS_Z, SamplerName.TEMPERATURE, SamplerName.PENALTIES), tfs_z=0.9, unpenalized=(13,)),
)
"""Sampler chains of the seven long requests; they cover every sampler, and state that passes from token to token."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run the requests. `cut`: bounds of stages, one worker per stage; 1.5 divides the experts of layer 1."""

    cut: tuple[float, ...]
    threads: int = 1
    company: bool = False  # all requests run at once, else one after the other
    prefill_chunk: int | None = None
    cached: bool = False  # runs requests twice; the second answers count, with prompts in the prefix cache if they fit
    preempted: bool = False  # KV memory is so small that sequences are preempted
    feature_level: str | None = None
    kv_type: KvType = KvType.F16
    every: bool = False  # also runs the seven long requests, even one by one
    drafted: bool = False  # tokens are drafted, most of them from the known answers, even if it does not pay
    wide_tiles: bool = False  # quant types with wide tiles use them, even if it does not pay
    shares: tuple[int, ...] = ()  # of the group that holds the first stage; a group of two also holds the last stage

    def held(self) -> Iterator[tuple[list[str], tuple[float, float]]]:
        """Yields the workers and the layers of each stage."""
        names, last = (f"w{number}" for number in count()), len(self.cut) - 2
        for index, layers in enumerate(pairwise(self.cut)):
            in_group = index == 0 or (index == last and len(self.shares) == 2)
            members = len(self.shares) if self.shares and in_group else 1
            yield [next(names) for _ in range(members)], layers


@dataclass(frozen=True, slots=True)
class Work:
    """Requests to compare: one greedy, one seeded whose context is longer than a span, one that scores its prompt, one
    for hidden states, and seven with answers so long that they are preempted when KV memory is short."""

    generations: tuple[GenerationRequest, ...]
    kv_heads: int
    head_dim: int

    def requests_of(self, way: Way) -> tuple[GenerationRequest, ...]:
        """Returns the requests; the long ones generate a third of their tokens unless `every` or `preempted` is set."""
        if way.every or way.preempted:
            return self.generations
        grow = (
            replace(generation, max_new_tokens=generation.max_new_tokens // 3) for generation in self.generations[_OWN:]
        )
        return self.generations[:_OWN] + (tuple(grow) if way.company else ())

    @property
    def longest(self) -> int:
        return max(len(generation.prompt) + generation.max_new_tokens for generation in self.generations)


@cache
def make_work(seed: int, vocabulary: int, kv_heads: int, head_dim: int, long: int = 530, tokens: int = 12) -> Work:
    """Builds requests with random prompts; `long`: tokens of the longest prompt."""
    print(f"work: seed {seed}")
    source = random.Random(seed)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, vocabulary) for _ in range(length))

    own = (
        GenerationRequest("greedy", prompt(37), tokens),
        GenerationRequest("seeded", prompt(long), tokens, _SEEDED, seed=source.getrandbits(64)),
        GenerationRequest("scored", prompt(70), 2, score_from=1),
        GenerationRequest("embedded", prompt(53), 0, embedded=(0, 53)),
    )
    others = tuple(
        GenerationRequest(
            f"other {i}",
            prompt(source.randrange(5, 12)),
            8 * tokens,
            replace(_SEEDED, chain=chain),
            seed=i,
            dry_window=40,
            breakers={3: ((3,), (3, 4))},
        )
        for i, chain in enumerate(_CHAINS)
    )
    return Work(own + others, kv_heads, head_dim)


def run(
    model: Path, way: Way, work: Work, folder: Path, monkeypatch: pytest.MonkeyPatch, known: Sequence[Answer] = ()
) -> list[Answer]:
    """Starts a cluster of real processes, runs `work.requests_of(way)` and returns the answers in that order.

    Ways without `company` run the first four requests only, unless `every` or `preempted`.
    """
    if way.feature_level is not None:
        monkeypatch.setenv("LLAMACLUST_FEATURE_LEVEL", way.feature_level)
    if way.wide_tiles:
        monkeypatch.setattr("llamaclust.cluster.control.planning.is_clearly_faster", lambda plan, own: True)
    windows = draft(_texts(work, known), random.Random(11), 320, monkeypatch) if way.drafted else None
    answers = asyncio.run(_run(model, way, work, folder))
    assert windows is None or windows.rows > 0, "no token was drafted"
    return answers


def _texts(work: Work, known: Sequence[Answer]) -> list[list[int]]:
    """Returns the token ids of prompts with their known answers."""
    return [
        [*generation.prompt, *(token for token, _ in answer[len(answer) - generation.max_new_tokens :])]
        for generation, answer in zip(work.generations, known, strict=False)
    ]


async def _run(model: Path, way: Way, work: Work, folder: Path) -> list[Answer]:
    names = [name for members, _ in way.held() for name in members]
    overrides = [
        f"model={model}",
        "workers=[" + ", ".join(f"{{name: {name}, threads: {way.threads}, {_FACTS}}}" for name in names) + "]",
        "plan=[" + ", ".join(_plan_entry(way, members, layers) for members, layers in way.held()) + "]",
        f"context_length={max(work.longest, 1024)}",
        f"prefill_chunk={way.prefill_chunk or 'auto'}",
        f"kv_type={way.kv_type}",
        f"wide_tiles={way.wide_tiles}",
    ]
    if way.preempted:
        most_heads = max(ceil(b - a) * _kv_heads(way, members, work.kv_heads) for members, (a, b) in way.held())
        tokens = -(-work.longest // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
        head_bytes = way.kv_type.pair_bytes(work.head_dim)
        overrides += [f"kv_memory={tokens * most_heads * head_bytes}B", f"context_length={work.longest}"]
    config = load_config(None, overrides)
    directory = ClusterDir(folder / "cluster")
    directory.create()
    async with asyncio.timeout(_DEADLINE_S), open_cluster(config, [model], directory) as cluster:
        if way.wide_tiles:
            with Model.open(model) as opened:
                assert cluster.plan.wide_tiles == opened.has_wider_tiles
        answers = await _answers(cluster, way, work)
        if way.cached:
            before = cluster.engine.scheduler.counts.cached_tokens
            answers = await _answers(cluster, way, work)
            hits = cluster.engine.scheduler.counts.cached_tokens - before
            assert hits > 0 or way.preempted, "the prefix cache was not hit"
        if way.preempted and not way.drafted:  # with drafts, sequences may end before others need their memory
            assert cluster.engine.scheduler.counts.preemptions > 0, "nothing was preempted"
        return answers


def _kv_heads(way: Way, members: Sequence[str], heads: int) -> int:
    """Returns the largest number of KV heads of a layer that a member holds."""
    if not 1 < len(members) <= heads:
        return heads
    return max(end - begin for begin, end in pairwise(borders(heads, way.shares)))


def _plan_entry(way: Way, members: Sequence[str], layers: tuple[float, float]) -> str:
    held = f"layers: [{layers[0]}, {layers[1]}]"
    if len(members) == 1:
        return f"{{worker: {members[0]}, {held}}}"
    return f"{{workers: [{', '.join(members)}], {held}, shares: [{', '.join(map(str, way.shares))}]}}"


_FACTS = "memory_bandwidth_gb_s: 20, int8_gmac_s: 300"
"""Given speeds, so that none is measured."""


def check_answers(answers: list[Answer], expected: list[Answer]) -> None:
    """Asserts that each answer equals the beginning of the expected one."""
    assert answers == [wanted[: len(answer)] for answer, wanted in zip(answers, expected, strict=False)]


async def _answers(cluster: Cluster, way: Way, work: Work) -> list[Answer]:
    generations = work.requests_of(way)
    if way.company or way.preempted:
        return await asyncio.gather(*(_answer_to(cluster, generation) for generation in generations))
    return [await _answer_to(cluster, generation) for generation in generations]


async def _answer_to(cluster: Cluster, generation: GenerationRequest) -> Answer:
    rows: list[RowResult] = []
    hidden = b""
    tokens = 0
    async for event in cluster.engine.submit(generation):
        match event:
            case PromptScored():
                rows += event.rows
            case PromptEmbedded():
                hidden += event.data
            case TokenSampled():
                rows.append(event.row)
                tokens += 1
    assert tokens == generation.max_new_tokens
    scored = tuple((row.token, struct.pack("<f", row.logprob)) for row in rows)
    return embedded_answer(hidden, generation) if hidden else scored


def embedded_answer(hidden: bytes, generation: GenerationRequest) -> Answer:
    """Splits the hidden states of a request into rows."""
    first, end = generation.embedded or (0, 0)
    size = len(hidden) // (end - first)
    assert size * (end - first) == len(hidden)
    return tuple((first + row, hidden[row * size : (row + 1) * size]) for row in range(end - first))
