"""Requests to clusters that serve the same model in different ways, in turns."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from emulation import Emulation, LinkSpeed
from measuring.idleness import Idleness
from measuring.lines import report
from measuring.priority import before_other_programs
from served_figures import Sample, Turn
from streams import StreamedAnswer, streamed, streamed_together
from ways import ServedWay

from llamaclust.core.errors import LlamaclustError

_SEED = 1
_CHECKED_TOKENS = 16
_SHORT_PROMPT = 16
REPEATED_PROMPT = 512
_PLAIN_WORDS = 300
"""Ids before are special tokens, bytes and letters."""

Key = tuple[str, float]
"""A part and a round trip."""


@dataclass(slots=True)
class Comparison:
    """Clusters that serve the same model in different ways."""

    given: argparse.Namespace
    served: list[ServedWay]
    emulation: Emulation | None
    source: random.Random = field(default_factory=lambda: random.Random(_SEED))
    idleness: Idleness = field(default_factory=Idleness)

    async def check(self) -> None:
        """LlamaclustError where ids or logprobs differ."""
        prompt = self._prompt(_SHORT_PROMPT)
        answers = [await self._request(each, prompt, _CHECKED_TOKENS, logprobs=1) for each in self.served]
        for each, answer in zip(self.served, answers, strict=True):
            if (answer.ids, answer.logprobs) != (answers[0].ids, answers[0].logprobs):
                raise LlamaclustError(f"{each.way.name} has other tokens or logprobs than {self.served[0].way.name}")

    async def measure(self, parts: Sequence[str], repeats: int) -> dict[Key, list[Turn]]:
        """One turn more is not counted, since clusters learn from it."""
        found = defaultdict[Key, list[Turn]](list)
        for number in range(repeats + 1):
            for trip in self.given.delays if number else self.given.delays[:1]:
                self._set_link(trip)
                for part in parts:
                    report(f"turn {number} of {repeats}: {part}, {trip:g} ms")
                    turn = await self._turn(part, number)
                    found[part, trip] += [turn] if number else []
        self._set_link(0.0)
        return found

    def _set_link(self, round_trip_ms: float) -> None:
        if self.emulation is not None:
            self.emulation.set(LinkSpeed(round_trip_ms, self.given.gbit))

    async def _turn(self, part: str, number: int) -> Turn:
        """The first way is another one in each turn."""
        prompts = self._prompts(part)
        at = number % len(self.served)
        samples, answers = dict[str, Sample](), list[list[StreamedAnswer]]()
        with self.idleness.watched([pid for each in self.served for pid in each.pids]):
            for each in [*self.served[at:], *self.served[:at]]:
                sample, given = await self._sample(each, part, prompts)
                samples[each.way.name] = sample
                answers.append(given)
        if len({tuple(answer.ids for answer in given) for given in answers}) > 1:
            raise LlamaclustError(f"{part}: not all ways have the same tokens")
        return samples

    async def _sample(
        self, served: ServedWay, part: str, prompts: Sequence[Sequence[int]]
    ) -> tuple[Sample, list[StreamedAnswer]]:
        tokens = 1 if part == "prefill" else self.given.tokens
        before = await served.reading()
        with self._priority(served):
            begun_ns = perf_counter_ns()
            answers = await asyncio.to_thread(streamed_together, served.bench.api, prompts, tokens)
            took_ms = (perf_counter_ns() - begun_ns) / 1e6
        if self.given.realtime:
            await asyncio.sleep(2 * took_ms / 1e3)  # other programs had to wait
        reading = (await served.reading()).since(before, tokens * len(prompts))
        times = {"decode": answers[0].token_ms if tokens > 1 else 0.0, "prefill": answers[0].first_ms}
        return Sample(times.get(part, took_ms / tokens / len(prompts)), reading), answers

    @contextmanager
    def _priority(self, served: ServedWay) -> Iterator[None]:
        """The coordinator and this client go before workers, as tasks that were asleep do."""
        with ExitStack() as stack:
            if self.given.realtime:
                coordinator, *workers = served.pids
                stack.enter_context(before_other_programs(workers))
                stack.enter_context(before_other_programs([coordinator, os.getpid()], priority=2))
            yield

    def _prompts(self, part: str) -> list[list[int]]:
        if self.given.speculation:
            return [self.given.repeated]
        count = self.given.together if part == "together" else 1
        return [self._prompt(self.given.prompt if part == "prefill" else _SHORT_PROMPT) for _ in range(count)]

    def _prompt(self, tokens: int) -> list[int]:
        return [self.source.randrange(_PLAIN_WORDS, self.given.vocabulary) for _ in range(tokens)]

    async def repeated(self) -> list[int]:
        """A prompt that its greedy answer goes on to repeat, by `neutral` weights."""
        while True:
            begin = self._prompt(1)
            ids = (await self._request(self.served[0], begin, REPEATED_PROMPT)).ids
            if ids[-1] in ids[: -len(ids) // 4]:
                return [*begin, *ids]

    async def _request(self, served: ServedWay, prompt: Sequence[int], tokens: int, **more: Any) -> StreamedAnswer:
        return await asyncio.to_thread(streamed, served.bench.api, prompt, tokens, **more)
