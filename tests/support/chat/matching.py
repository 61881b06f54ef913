"""Matchers over a small vocabulary of byte tokens, and steps of a stage that uses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llamaclust.core.sampler.matchers import AllowedTokens, Grammar, MatcherStart, Reasoning
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow, SampleTask
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.worker.stage.matchers import StageMatchers
from llamaclust.worker.stage.step_inputs import StepInputs
from support.chat.random_schemas import token_set
from support.wire.frame_reader import MODEL_ID, wire_reader

END = 256
VOCABULARY = GrammarVocabulary(
    [*(bytes([byte]) for byte in range(256)), b"\xff<end>"], [END], lambda text: [*text.encode()]
)
ABC = definitions.of_regex("[ab]c(d|e)", "guided_regex")


class Task(NamedTuple):
    """A row to sample and, if its matcher starts there, how it starts."""

    row: SampleTask
    start: MatcherStart | None


def task(
    key: int,
    place: int,
    grammar: Grammar | None = None,
    said: str = "",
    *,
    may_force: bool = False,
    drafts_forced: bool = False,
    min_tokens: bool = False,
    reasoning: Reasoning | None = None,
    owner: int = 0,
) -> Task:
    start = None
    if grammar is not None or reasoning is not None:
        start = MatcherStart(key, grammar, tuple(said.encode()), reasoning, may_force, drafts_forced, owner)
    suppressed, row = (END,) if min_tokens else (), MatcherRow(key, place)
    return Task(SampleTask(SamplingParams(), 0, 0, 9, suppressed=suppressed, matcher=row), start)


def inputs_of(number: int, *tasks: Task, released: tuple[int, ...] = ()) -> StepInputs:
    """Builds complete inputs of a last stage; each drafted row is in the chunk of the preceding row."""
    starts = tuple(each.start for each in tasks if each.start is not None)
    chunks: list[list[int]] = []
    for each in tasks:
        assert each.row.matcher is not None
        if each.row.matcher.drafted is None:
            chunks.append([0])
        else:
            chunks[-1].append(each.row.matcher.drafted)
    rows = tuple(each.row for each in tasks)
    inputs = StepInputs.read(encode_inputs(SamplingInputs(1, number, rows, released, starts)))
    if chunks:
        work = tuple(Chunk(tuple(tokens), 0, (2 * place, 2), len(tokens)) for place, tokens in enumerate(chunks))
        microbatch = Microbatch(MODEL_ID, 1, number, work)
        inputs.tasks.complete(wire_reader(MODEL_ID).read(encode_hidden(encode_microbatch(microbatch))))
    return inputs


def begin(stage: StageMatchers, inputs: StepInputs) -> list[int]:
    """Waits until the matchers are ready and returns the places of rows that only the end token may follow."""
    stage.receive(inputs)
    for answer in (*filter(None, stage._changes.values()), *stage._answers.values()):
        answer.ready.result(60)
    return stage.begin(inputs.tasks)


def step(
    stage: StageMatchers, number: int, *tasks: Task, says: str, refused: str = "", released: tuple[int, ...] = ()
) -> tuple[list[set[str]], tuple[RowResult, ...]]:
    """Samples the letters of `refused`, or else `says`, then those of `says` in rows whose grammar refused theirs.
    Returns the allowed letters of such rows and all results."""
    begin(stage, inputs_of(number, *tasks, released=released))
    results, allowed = taken(stage, map(sampled, refused or says))
    for place in allowed:
        results[place] = sampled(says[place])
    assert not allowed or not stage.take(results)
    return [{"." if i == END else chr(i) for i in token_set(bits)} for bits in allowed.values()], tuple(results)


def taken(stage: StageMatchers, rows: Iterable[RowResult]) -> tuple[list[RowResult], dict[int, AllowedTokens]]:
    """Returns the results, and the allowed tokens of rows whose sampled token is refused."""
    results = list(rows)
    refused = stage.take(results)
    return results, refused


def sampled(letter: str) -> RowResult:
    return RowResult(END if letter == "." else ord(letter), -1.0)
