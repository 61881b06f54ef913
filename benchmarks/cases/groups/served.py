from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from emulated.emulation import Emulation, LinkSpeed
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, running
from runner.in_process import pin_process
from runner.models import TYPES, write_weakened
from runner.options import chosen, listed, natural, positive, share, zero_or_more
from runner.processes import before_other_programs
from runner.streams import Answer, answer
from runner.turns import spread
from shape import SHAPES, write_shape

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.quant_types import QuantType

_SHALLOW = 2
_SHORT_PROMPT, _REPEATED_PROMPT = 16, 512
_PLAIN_WORDS = 300
"""The smallest id of a plain word. Lower ids belong to special tokens, bytes and letters."""
_LOOKS, _LOOK_S = 600, 0.1
_COMMAND = (sys.executable, "-P", "-m", "llamaclust")
ONE, STAGES, GROUP = "one worker", "stages", "group"
_GOALS = {
    ("7b", "IQ2_XXS", 0.0): 1.60,
    ("7b", "IQ2_XXS", 0.1): 1.50,
    ("7b", "IQ1_S", 0.0): 1.75,
    ("7b", "IQ1_S", 0.1): 1.55,
    ("70b", "IQ1_S", 0.0): 1.60,
    ("70b", "IQ1_S", 0.5): 1.60,
    ("70b", "IQ1_S", 2.0): 1.35,
    ("1.1b", "IQ2_XXS", 0.0): 1.50,
}
"""The expected decode gain of a group of two members, by shape, weight type, and round-trip time in ms."""


@dataclass(frozen=True, slots=True)
class Way:
    """A kind of cluster, such as a group of workers. `cores` and `speeds` have one value for each worker, in order."""

    name: str
    cores: tuple[int, ...]
    shares: tuple[int, ...] = ()  # Shares of the weights that the members of a group hold; empty without a group.
    speeds: tuple[float, ...] = (1.0,)

    def plan(self, layers: int) -> list[dict[str, Any]]:
        names = Layout(workers=len(self.cores)).names
        if self.shares:
            return [{"workers": [*names], "layers": [0, layers], "shares": [*self.shares]}]
        borders = [layers * number // len(names) for number in range(len(names) + 1)]
        return [{"worker": name, "layers": [*pair]} for name, pair in zip(names, pairwise(borders), strict=True)]


def ways_of(cores: Sequence[int], shares: Sequence[int], speeds: Sequence[float]) -> list[Way]:
    """Returns the clusters to compare: the fastest worker alone, stages (only for equal speeds), and a group."""
    found = [Way(ONE, (cores[0],), speeds=(max(speeds),))]
    if len(set(speeds)) == 1:
        found.append(Way(STAGES, tuple(cores), speeds=tuple(speeds)))
    return [*found, Way(GROUP, tuple(cores), tuple(shares), tuple(speeds))]


@dataclass(frozen=True, slots=True)
class Depth:
    """Numbers of layers: of two measured models (`layers` and `shallow`), and of the extrapolated model (`whole`)."""

    layers: int
    shallow: int
    whole: int

    def whole_ms(self, deep: Sequence[float], few: Sequence[float]) -> list[float]:
        """Extrapolates to the whole model: a fixed time plus a time per layer. `few` are times of the shallow model."""
        if self.layers == self.whole or not few:
            return [*deep]
        most, least = median(deep), median(few)
        layer_ms = max(0.0, most - least) / (self.layers - self.shallow)
        fixed_ms = min(most, max(0.0, least - self.shallow * layer_ms))
        return [fixed_ms + (ms - fixed_ms) * self.whole / self.layers for ms in deep]


@dataclass(frozen=True, slots=True)
class ServedWay:
    name: str
    bench: Bench
    pids: tuple[int, ...]

    async def reading(self) -> tuple[float, ...]:
        """Returns milliseconds since the start: computing time of stages, a leader's wait for its group, and processor
        time of each process."""
        used = tuple(map(_processor_ms, self.pids))  # Read first, because waiting for heartbeats takes processor time.
        for _ in range(_LOOKS):
            found = await self.bench.cluster()
            beats = {worker["name"]: worker["heartbeat"] for worker in found["status"]["workers"]}
            steps = {stage["worker"]: stage["microbatches"] for stage in found["stages"]}
            if all(beats[name] is not None and beats[name]["microbatches"] >= count for name, count in steps.items()):
                computed = sum(stage["compute_ms"] * stage["microbatches"] for stage in found["stages"])
                return computed, sum(1e3 * group["waited_s"] for group in found["status"]["groups"]), *used
            await asyncio.sleep(_LOOK_S)
        raise LlamaclustError(f"{self.name}: no heartbeat has counted the last step")


def _processor_ms(pid: int) -> float:
    times = (each.read_text().split()[0] for each in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(map(int, times)) / 1e6


@dataclass(frozen=True)
class Served(Case):
    """Compares the speed of a group with the speed of one worker and of stages, as HTTP clients see it.

      run.py served 7b IQ2_XXS --delays 0,0.1,0.5,2 --gbit 1
      run.py served 70b IQ1_S --layers 4 --shares 2,1 --speeds 1,0.5  # each layer counts 20 times

    Each static worker has one thread on its own core, and mutual TLS. With --local, workers are processes of the
    coordinator, without TLS. `decode` is one answer to a short prompt. `prefill` is a long prompt up to the first token
    of its answer. `together` is several answers at the same time. Ids and logprobs must equal those of one worker.
    Delays of links and slow members are emulated. With --layers, models of two layers are also measured, and times of
    the whole model are extrapolated. With --speculation, all clusters draft, and answers repeat their prompt."""

    warm = 1
    shape: str = argument("shape of the model", chosen("shape", {name: name for name in SHAPES}))
    type: QuantType = argument("type of the weights", chosen("type", TYPES))
    layers: int | None = option(None, "number of layers, at least 3 (default: the shape's number)", positive)
    hidden: int | None = option(None, "width in channels, for tests (default: the shape's width)", positive)
    delays: tuple[float, ...] = option((0.0, 0.1, 0.5, 2.0), "round-trip times of links in ms", listed(zero_or_more))
    gbit: float = option(0.0, "rate in Gbit/s at which a member receives (0: no limit)", zero_or_more)
    shares: tuple[int, ...] = option(
        (1, 1), "shares of the weights that the members hold, such as 2,1", listed(positive)
    )
    speeds: tuple[float, ...] = option((), "speed of each member as a multiple of one core (default: 1)", listed(share))
    ways: tuple[str, ...] = option((STAGES, GROUP), "kinds of clusters to compare with one worker", listed(str))
    tokens: int | None = option(
        None, "number of tokens in an answer (default: 32, or 256 with --speculation)", positive
    )
    prompt: int = option(512, "number of tokens in the long prompt (0: measure no long prompt)", natural)
    together: int = option(8, "number of simultaneous answers (0: measure single answers only)", natural)
    speculation: bool = option(False, "draft tokens, with answers that repeat their prompts")
    realtime: bool = option(False, "give measured processes real-time priority; needs root")
    local: bool = option(False, "run workers as the coordinator's processes, without TLS and emulation")

    def __post_init__(self) -> None:
        if len(self.shares) < 2 or (self.speeds and len(self.speeds) != len(self.shares)):
            raise UsageError("--shares and --speeds must have the same number of members, at least two")
        if self.layers is not None and not _SHALLOW < self.layers <= SHAPES[self.shape].layers:
            raise UsageError(f"--layers must be {_SHALLOW + 1} to {SHAPES[self.shape].layers}")
        if self.local and (self.gbit or max(self.delays) or (self.speeds and min(self.speeds) < 1)):
            raise UsageError("--local emulates nothing; give --delays 0, and neither --gbit nor --speeds below 1")

    async def groups(self) -> AsyncIterator[Group]:
        depth = Depth(self.layers or SHAPES[self.shape].layers, _SHALLOW, SHAPES[self.shape].layers)
        few: dict[str, Group] = {}
        with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
            for layers in (_SHALLOW, depth.layers) if depth.layers < depth.whole else (depth.layers,):
                async with AsyncExitStack() as stack:
                    emulation = None if self.local else Emulation.build(Path(folder))
                    model = self._write(Path(folder), layers)
                    served = [
                        await stack.enter_async_context(self._serving(way, model, layers, emulation))
                        for way in ways_of(self._cores, self.shares, self._speeds)
                        if way.name in (ONE, *self.ways)
                    ]
                    repeated = await self._repeated(served[0]) if self.speculation else []
                    for trip in self.delays:
                        if emulation is not None:
                            emulation.set(LinkSpeed(trip, self.gbit))
                        for part in self._parts:
                            name = f"{part}, round trip {trip:g} ms"
                            ways = {each.name: partial(self._measure, each, part, repeated) for each in served}
                            group = Group(f"{layers} layers, {name}", ways)
                            yield group
                            if layers == depth.layers:
                                self._show(name, part, trip, depth, group, few.get(name))
                            few[name] = group

    def _show(self, name: str, part: str, trip: float, depth: Depth, deep: Group, few: Group | None) -> None:
        goal = _GOALS.get((self.shape, self.type.name, trip)) if part == "decode" and self.shares == (1, 1) else None
        whole = {
            way: depth.whole_ms(deep.values(way, "ms"), few.values(way, "ms") if few is not None else [])
            for way in deep.variants
        }
        for way in [*deep.variants][1:]:
            gains = [one / ms for one, ms in zip(whole[ONE], whole[way], strict=True)]
            wanted = f", goal {goal:.2f}" if goal is not None and way == GROUP else ""
            times = f"{median(whole[ONE]):.2f} -> {median(whole[way]):.2f} ms"
            print(f"all layers, {name}: {way} {times}, {ONE} / {way} {spread(gains)}{wanted}", flush=True)

    @property
    def _parts(self) -> list[str]:
        sizes = {"decode": 1, "prefill": self.prompt, "together": self.together}
        return ["decode"] if self.speculation else [part for part, size in sizes.items() if size]

    @property
    def _cores(self) -> list[int]:
        cpus = sorted(os.sched_getaffinity(0))
        return [cpus[member % len(cpus)] for member in range(len(self.shares))]

    @property
    def _speeds(self) -> tuple[float, ...]:
        return self.speeds or (1.0,) * len(self.shares)

    @property
    def _tokens(self) -> int:
        return self.tokens or (256 if self.speculation else 32)

    def _write(self, folder: Path, layers: int) -> Path:
        shape, path = replace(SHAPES[self.shape], layers=layers), folder / f"layers-{layers}.gguf"
        if self.hidden:
            shape = replace(shape, hidden=self.hidden, ffn=2 * self.hidden, vocabulary=512)
        if self.speculation:
            write_weakened(path, shape, self.type)
        else:
            write_shape(path, self.shape, shape, self.type, alike=True)
        return path

    @asynccontextmanager
    async def _serving(
        self, way: Way, model: Path, layers: int, emulation: Emulation | None
    ) -> AsyncIterator[ServedWay]:
        context = max(1024, self.prompt + self._tokens + 64, 2 * _REPEATED_PROMPT + self._tokens)
        keys: Mapping[str, Any] = {
            "plan": way.plan(layers),
            "context_length": context,
            "speculative": "auto" if self.speculation else "off",
            "prefix_cache": self.speculation,
            "max_sequences": max(8, self.together),
        }
        layout = Layout(workers=len(way.cores), keys=keys)
        if emulation is not None:
            places = zip(layout.names, way.cores, way.speeds, strict=True)
            prefixes = {name: emulation.prefix(core, speed) for name, core, speed in places}
            layout = replace(layout, launcher="static", prefixes=prefixes, is_secure=True)
        core = sorted(os.sched_getaffinity(0))[1 % len(os.sched_getaffinity(0))]
        async with running(model, layout, ("taskset", "-c", str(core), *_COMMAND)) as (bench, coordinator):
            workers = {worker["name"]: worker for worker in (await bench.status())["workers"]}
            pids = [workers[name]["pid"] for name in sorted(workers)]
            for pid, own in zip(pids, way.cores, strict=True):
                pin_process(pid, own)
            yield ServedWay(way.name, bench, (coordinator.pid, *pids))

    async def _measure(self, served: ServedWay, part: str, repeated: Sequence[int], turn: int) -> Measures:
        tokens, prompts = 1 if part == "prefill" else self._tokens, self._prompts(part, repeated, turn)
        before = await served.reading()
        with self._priority(served):
            begun_s = perf_counter()
            requests = (answer(served.bench.api, prompt, tokens, logprobs=0) for prompt in prompts)
            answers: list[Answer] = await asyncio.gather(*requests)
            took_s = perf_counter() - begun_s
        if self.realtime:
            await asyncio.sleep(2 * took_s)  # Other programs get the time that they had to wait.
        count = tokens * len(prompts)
        computed, waited, *used = (
            (now - then) / count for now, then in zip(await served.reading(), before, strict=True)
        )
        seconds = {"decode": answers[0].token_s, "prefill": answers[0].first_s, "together": took_s / count}
        bits = b"".join(each.bits for each in answers)
        figures = {"ms": 1e3 * seconds[part], "computed": computed, "gathers": waited}
        return {**figures, "processors": " ".join(f"{ms:.2f}" for ms in used), "tokens or logprobs": bits}

    def _priority(self, served: ServedWay) -> ExitStack:
        """Sets real-time priority with --realtime. The coordinator and this client have priority over the workers."""
        stack = ExitStack()
        if self.realtime:
            coordinator, *workers = served.pids
            stack.enter_context(before_other_programs(workers))
            stack.enter_context(before_other_programs([coordinator, os.getpid()], priority=2))
        return stack

    def _prompts(self, part: str, repeated: Sequence[int], turn: int) -> list[list[int]]:
        if self.speculation:
            return [[*repeated]]
        source, length = random.Random(f"{part} {turn}"), self.prompt if part == "prefill" else _SHORT_PROMPT
        words = 512 if self.hidden else SHAPES[self.shape].vocabulary
        count = self.together if part == "together" else 1
        return [[source.randrange(_PLAIN_WORDS, words) for _ in range(length)] for _ in range(count)]

    async def _repeated(self, served: ServedWay) -> list[int]:
        """Returns a prompt whose greedy answer repeats the prompt."""
        for turn in range(1_000):
            begin = self._prompts_begin(turn)
            ids = (await answer(served.bench.api, begin, _REPEATED_PROMPT)).ids
            if ids[-1] in ids[: -len(ids) // 4]:
                return [*begin, *ids]
        raise LlamaclustError("no answer repeats itself")

    def _prompts_begin(self, turn: int) -> list[int]:
        return [random.Random(turn).randrange(_PLAIN_WORDS, SHAPES[self.shape].vocabulary)]
