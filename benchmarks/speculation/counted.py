"""Gain of n-gram drafts on recorded answers, on a counted clock: the scheduler runs, and stages take what rows take.

    python benchmarks/speculation/counted.py ANSWERS.jsonl --record MODEL.gguf [--prompts 80 --tokens 200]
    python benchmarks/speculation/counted.py ANSWERS.jsonl

Records answers to the prompts of `texts.py` and what rows cost on this machine, once. From then on no model is needed,
and the same drafters have the same gains: for one worker with all threads, and for stages of one thread each behind
links of a round trip, the coordinator beside the first. `rounds` are the microbatches for 100 tokens.

`second`: of drafts whose first token was refused, those where the newest other token that followed the same last token
was right, and these as a share of all drafts: a tree with a second branch would save no more rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parents[2] / "tests")]

from corpus import KINDS, prompts  # noqa: E402
from measuring.options import chosen, listed, positive  # noqa: E402
from row_costs import RowCosts, measured  # noqa: E402
from texts import request_of  # noqa: E402
from turns import CONTEXT, served, together  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402
from llamaclust.cluster.scheduler.drafting.drafter import Drafter, Drafters  # noqa: E402
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest  # noqa: E402
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch  # noqa: E402
from llamaclust.cluster.scheduler.scheduler import Scheduler  # noqa: E402
from llamaclust.cluster.scheduler.settings import SchedulerSettings  # noqa: E402
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW  # noqa: E402
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings  # noqa: E402
from llamaclust.core.sampling import RowResult  # noqa: E402
from llamaclust.model.program import KV_BLOCK_TOKENS  # noqa: E402
from llamaclust.wire.microbatch.messages import Microbatch, Result, SamplingInputs  # noqa: E402
from support.clusters.fakes import FakeModel, FakeStages, Simulation, StageNs  # noqa: E402

_TOGETHER = 8
_NEAR_MS = 0.4
"""Of a round without links: the coordinator's share."""


@dataclass(frozen=True, slots=True)
class Recorded:
    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    vocabulary: int
    costs: tuple[RowCosts, RowCosts]  # with all threads, and with one
    answers: tuple[Recorded, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a cluster."""

    stages: int
    round_trip_ms: float

    @property
    def name(self) -> str:
        return f"{self.stages} stages, {self.round_trip_ms:g} ms" if self.stages > 1 else "one worker"

    @property
    def hop_ns(self) -> int:
        return round((self.round_trip_ms if self.stages > 1 else _NEAR_MS) * 1e6 / 2)

    def stage_ns(self, costs: RowCosts) -> StageNs:
        """Beyond what was measured, rows cost what those of prompts do."""
        last = costs.rows[-1]
        return lambda rows: (costs.at(rows) + max(0, rows - last) * costs.prefill_row_ns) / self.stages


SHAPES = (Shape(1, 0.0), Shape(2, 20.0), Shape(4, 50.0))


class RecordedModel(FakeModel):
    """Says what was recorded."""

    text: tuple[int, ...] = ()

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        (chunk,) = microbatch.chunks
        end = chunk.position + len(chunk.tokens) + 1
        said = self.text[end - chunk.outputs : end] if chunk.outputs else ()
        return tuple(RowResult(token, -1.0) for token in said) + (RowResult(0, -1.0),) * (chunk.outputs - len(said))


class BesideFirst(FakeStages):
    """The coordinator is on the first stage's host."""

    def send(self, scheduled: ScheduledMicrobatch, now_ns: int) -> tuple[int, Result]:
        return super().send(scheduled, now_ns - self.hop_ns)


@dataclass(frozen=True, slots=True)
class Course:
    """Of one answer, behind its first tokens."""

    tokens: int
    rounds: int
    ns: int


class Counted:
    """One cluster, whose scheduler learns from answer to answer."""

    def __init__(self, recording: Recording, shape: Shape, drafters: Drafters) -> None:
        settings = SchedulerSettings(
            "recorded",
            recording.vocabulary,
            CONTEXT,
            2 * CONTEXT // KV_BLOCK_TOKENS,
            prefix_cache=False,
            speculation=SpeculationSettings(drafters),
        )
        costs = recording.costs[shape.stages > 1]
        self._model = RecordedModel(settings.kv_blocks)
        stages = BesideFirst(self._model, [shape.stage_ns(costs)] * shape.stages, shape.hop_ns)
        self._scheduler = Scheduler(settings, 1, shape.stages)
        self._run = Simulation(self._scheduler, stages, stages.hop_ns)

    @property
    def counts(self) -> str:
        return f"{self._scheduler.drafts.accepted}/{self._scheduler.drafts.drafted}"

    def course(self, recorded: Recorded, most: int | None = None) -> Course:
        """With `most` drafted tokens at once."""
        run, self._model.text = self._run, (*recorded.prompt, *recorded.answer)
        key = run.add(GenerationRequest("r", recorded.prompt, len(recorded.answer), max_drafted=most))
        while not run.rows(key):
            run.step()
        first, rounds, begun_ns = len(run.rows(key)), len(run.microbatches), run.now_ns
        run.finish()
        tokens = tuple(row.token for row in run.rows(key))
        assert tokens == recorded.answer
        return Course(len(tokens) - first, len(run.microbatches) - rounds, run.now_ns - begun_ns)


def show(recording: Recording, shape: Shape, kinds: list[str], drafters: Drafters) -> None:
    counted = Counted(recording, shape, drafters)
    longest = max(recording.answers, key=lambda each: len(each.answer))
    plain = counted.course(longest, most=0)
    courses: dict[str, list[Course]] = {}
    for each in recording.answers:
        if each.kind in kinds:
            courses.setdefault(each.kind, []).append(counted.course(each))
    for kind, found in courses.items():
        gains = [each.tokens / each.ns * plain.ns / plain.tokens for each in found]
        rounds = 100 * sum(each.rounds for each in found) / sum(each.tokens for each in found)
        figures = f"{len(found):8}{median(gains):8.2f}{min(gains):8.2f}{max(gains):8.2f}{rounds:8.1f}"
        print(f"{shape.name:18}{kind:8}{figures}", flush=True)


@dataclass(slots=True)
class Seconds:
    """Drafts of answers, each verified whole before the next one."""

    drafts: int = 0
    refused: int = 0  # first tokens
    right: int = 0  # in place of these, the newest other token

    def add(self, recorded: Recorded, drafter: Drafter) -> None:
        text, end = [*recorded.prompt, *recorded.answer], len(recorded.prompt)
        while end < len(text):
            tokens = text[:end]
            drafted = drafter.draft(tokens, MAX_WINDOW).tokens
            pairs = enumerate(zip(drafted, text[end:], strict=False))
            count = next((place for place, (token, chosen) in pairs if token != chosen), len(drafted))
            self.drafts += bool(drafted)
            if drafted and not count:
                self.refused += 1
                self.right += _newest_other(tokens, drafted[0]) == text[end]
            end += count + 1


def _newest_other(tokens: list[int], refused: int) -> int | None:
    """What followed the last token, but not this."""
    pairs = zip(reversed(tokens[:-1]), reversed(tokens[1:]), strict=True)
    return next((token for before, token in pairs if before == tokens[-1] and token != refused), None)


def show_seconds(recording: Recording, kinds: list[str]) -> None:
    for kind in kinds:
        found = Seconds()
        for each in recording.answers:
            if each.kind == kind:
                found.add(each, NgramDrafters().of(""))
        of_refused, of_all = (found.right / max(count, 1) for count in (found.refused, found.drafts))
        print(
            f"second            {kind:8}{found.drafts:8} drafts, {found.refused} refused{of_refused:8.2f}{of_all:8.3f}"
        )


def write(path: Path, model: Path, given: argparse.Namespace) -> None:
    """Whole or not at all."""
    costs = [measured(model, threads, given.characters // 4) for threads in (given.threads, 1)]
    vocabulary, answers = asyncio.run(record(model, given))
    head = {"vocabulary": vocabulary, "costs": [asdict(each) for each in costs]}
    text = "".join(f"{json.dumps(line)}\n" for line in (head, *map(asdict, answers)))
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)


async def record(path: Path, given: argparse.Namespace) -> tuple[int, list[Recorded]]:
    """Answers of at least two tokens, several at a time."""
    found: list[Recorded] = []
    async with served(path, 1, given.threads, NgramDrafters()) as model:
        asked = list(prompts(model.model, tuple(KINDS), given.prompts, given.characters, given.seed))
        pairs = [(each, request_of(model, each, given.tokens, number)) for number, each in enumerate(asked)]
        pairs = [(prompt, request) for prompt, request in pairs if request.max_new_tokens >= 2]
        for start in range(0, len(pairs), _TOGETHER):
            some = pairs[start : start + _TOGETHER]
            answers, _ = await together(model.engine, [request for _, request in some])
            for (prompt, request), answer in zip(some, answers, strict=True):
                found.append(Recorded(prompt.kind, request.prompt, answer.tokens))
        return model.vocabulary, found


def read(path: Path) -> Recording:
    head, *lines = map(json.loads, path.read_text().splitlines())
    costs = [RowCosts(tuple(each["rows"]), tuple(each["ns"]), each["prefill_row_ns"]) for each in head["costs"]]
    return Recording(head["vocabulary"], (costs[0], costs[1]), tuple(_recorded(lines)))


def _recorded(lines: list[dict[str, object]]) -> Iterator[Recorded]:
    for line in lines:
        prompt, answer = line["prompt"], line["answer"]
        assert isinstance(prompt, list) and isinstance(answer, list)
        yield Recorded(str(line["kind"]), tuple(prompt), tuple(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="a file of recorded answers")
    parser.add_argument("--record", type=Path, metavar="MODEL", help="path of a .gguf: record its answers first")
    parser.add_argument("--prompts", type=positive, default=80, help="to record; %(default)s by default")
    parser.add_argument("--kinds", type=listed(chosen("--kinds", {k: k for k in KINDS})), default=list(KINDS))
    parser.add_argument("--tokens", type=positive, default=200, help="of an answer, at most; %(default)s by default")
    parser.add_argument("--characters", type=positive, default=1200, help="of a text in a prompt")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="of one worker alone")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.record is not None:
        write(given.answers, given.record, given)
    recording = read(given.answers)
    print(f"{'':18}{'kind':8}{'prompts':>8}{'median':>8}{'worst':>8}{'best':>8}{'rounds':>8}")
    for shape in SHAPES:
        show(recording, shape, given.kinds, NgramDrafters())
    show_seconds(recording, given.kinds)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
