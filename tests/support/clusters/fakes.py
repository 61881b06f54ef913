"""Fake stages: a model whose tokens are hashes of the contents of KV blocks, and a simulated clock."""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from llamaclust.cluster.engine.failures import PipelineFailure
from llamaclust.cluster.engine.pipeline import KvDisks, PipelineEncoder, StageInfo
from llamaclust.cluster.scheduler.dry_breakers import SeenBreakers
from llamaclust.cluster.scheduler.requests import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptEmbedded,
    PromptScored,
    TokenSampled,
    Update,
)
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask, ScoreTask
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs, StageTiming
from support.wire.plain_tokens import PlainTokensBox, sampled_tokens_of

VOCABULARY = 101


@dataclass
class Losses:
    """An owner of an engine that records reported failures."""

    failures: list[PipelineFailure] = field(default_factory=list)
    retiring: list[PipelineFailure] = field(default_factory=list)
    may_suspect_workers: bool = False
    ended_rows: list[int] = field(default_factory=list)

    def pipeline_lost(self, failure: PipelineFailure) -> None:
        self.failures.append(failure)

    def retiring_pipeline_lost(self, failure: PipelineFailure) -> None:
        self.retiring.append(failure)

    def engine_closed(self) -> None: ...

    def rows_failed(self, key: int) -> None:
        self.ended_rows.append(key)


WIDTH = 4  # of hidden states


def blocks_of(chunk: Chunk) -> list[int]:
    """Returns the blocks of a chunk's block table."""
    runs = zip(chunk.table[::2], chunk.table[1::2], strict=True)
    return [block for start, count in runs for block in range(start, start + count)]


def answer(tokens: Sequence[int], task: RowTask) -> RowResult:
    """Returns the fake model's result after these tokens; any other tokens give another result."""
    if isinstance(task, SampleTask):
        inputs: tuple[object, ...] = (
            task.seed,
            task.choice,
            task.position,
            task.params,
            tuple(task.history),
            task.top_logprobs,
            _more(tokens, task),
        )
    else:
        inputs = (task.token, task.top_logprobs)
    digest = sha256(array("q", tokens).tobytes() + repr(inputs).encode()).digest()
    value = int.from_bytes(digest[:8])
    if isinstance(task, ScoreTask):
        return RowResult(task.token, -(value % 4096) / 64)
    allowed = [token for token in range(VOCABULARY) if token not in task.suppressed]
    mu = task.mu + value % 7 if task.params.needs_state else None
    return RowResult(allowed[value % len(allowed)], -(value % 4096) / 64, mu=mu)


def hidden_state(tokens: Sequence[int]) -> bytes:
    """Returns the fake model's hidden state of the last token."""
    digest = sha256(array("q", tokens)).digest()
    return (np.frombuffer(digest[: 2 * WIDTH], "<u2") / 64).astype("<f4").tobytes()


def _more(tokens: Sequence[int], task: SampleTask) -> tuple[object, ...]:
    """Returns the other inputs of the result, with those breakers in the tokens that begin before the last token."""
    begun = (breaker for breaker in task.breakers if breaker[0] in tokens[:-1])
    breakers = sorted(breaker for breaker in begun if _stands_in(breaker, tuple(tokens)))
    return task.penalty_window, task.dry_window, breakers, task.mu


def _stands_in(breaker: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    return any(tokens[start : start + len(breaker)] == breaker for start in range(len(tokens)))


@dataclass
class FakeModel:
    """A model whose results are hashes of its KV blocks, so wrong block tables and lost blocks change tokens."""

    kv_blocks: int
    kv: dict[int, list[int]] = field(default_factory=dict)  # tokens of the written positions by block id
    writes: int = 0

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        # A sequence must not read keys and values that another sequence of the same microbatch writes,
        # so the rows of all sequences are read before any is written.
        tables = [self._table(chunk) for chunk in microbatch.chunks]
        before = [self._read(tables[i], chunk.position) for i, chunk in enumerate(microbatch.chunks)]
        tasks = iter(inputs.tasks)
        rows: list[RowResult] = []
        for table, context, chunk in zip(tables, before, microbatch.chunks, strict=True):
            self._write(table, chunk)
            for row in range(len(chunk.tokens) - chunk.outputs, len(chunk.tokens)):
                task = next(tasks)
                if isinstance(task, SampleTask):
                    assert task.position == chunk.position + row + 1
                rows.append(answer([*context, *chunk.tokens[: row + 1]], task))
        assert next(tasks, None) is None
        return tuple(rows)

    def embeddings(self, microbatch: Microbatch) -> bytes:
        """Returns the requested hidden states of the microbatch that was run last."""
        return b"".join(
            hidden_state(self._read(blocks_of(chunk), chunk.position + row + 1))
            for chunk in microbatch.chunks
            for row in range(*chunk.embedded)
        )

    def _table(self, chunk: Chunk) -> list[int]:
        table = blocks_of(chunk)
        assert all(0 <= block < self.kv_blocks for block in table)
        assert len(set(table)) == len(table)
        return table

    def _read(self, table: list[int], end: int) -> list[int]:
        tokens: list[int] = []
        for block in table[: -(-end // KV_BLOCK_TOKENS)]:
            tokens += self.kv[block]
        assert len(tokens) >= end, "a position is read that was never written"
        del tokens[end:]
        return tokens

    def _write(self, table: list[int], chunk: Chunk) -> None:
        for position, token in enumerate(chunk.tokens, chunk.position):
            block = self.kv.setdefault(table[position // KV_BLOCK_TOKENS], [])
            offset = position % KV_BLOCK_TOKENS
            assert offset <= len(block), "positions before this one were never written"
            block[offset : offset + 1] = [token]
        self.writes += len(chunk.tokens)


class ConstantModel(FakeModel):
    """A model that returns the same result for every row without computing it."""

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        return (RowResult(1, -1.0),) * len(inputs.tasks)


StageNs = Callable[[int], float]


@dataclass
class FakeStages:
    """Consecutive stages on a simulated clock: stage i takes `stage_ns[i](rows)` for a microbatch, a link `hop_ns`."""

    model: FakeModel
    stage_ns: Sequence[StageNs]
    hop_ns: int = 1000
    beside: float = 1.0  # factor of a stage's time while another stage computes
    chosen: PlainTokensBox = field(default_factory=PlainTokensBox)
    chosen_ns: dict[int, int] = field(default_factory=dict)  # when a microbatch's tokens reach the first stage
    free_at: list[int] = field(default_factory=list)
    busy_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_at = [0] * len(self.stage_ns)
        self.busy_ns = [0] * len(self.stage_ns)

    def send(self, scheduled: ScheduledMicrobatch, now_ns: int) -> tuple[int, Result]:
        """Returns the time at which the result arrives, and the result."""
        microbatch = scheduled.microbatch
        followed = [chunk.depends_on[0] for chunk in microbatch.chunks if chunk.depends_on]
        timings = []
        for stage, stage_ns in enumerate(self.stage_ns):
            now_ns += self.hop_ns
            if stage == 0:
                now_ns = max([now_ns, *(self.chosen_ns[number] for number in followed)])
            start = max(now_ns, self.free_at[stage])
            is_beside = any(at > start for other, at in enumerate(self.free_at) if other != stage)
            compute = round(stage_ns(microbatch.rows) * (self.beside if is_beside else 1.0))
            timings.append(StageTiming(start - now_ns, compute, 0, microbatch.rows))
            now_ns = self.free_at[stage] = start + compute
            self.busy_ns[stage] += compute
        inputs = self.chosen.fill_inputs(scheduled.inputs, microbatch)
        rows = self.model.run(self.chosen.filled(microbatch), inputs)
        self.chosen.put(sampled_tokens_of(microbatch.number, rows))
        self.chosen_ns[microbatch.number] = now_ns + self.hop_ns * (len(self.stage_ns) > 1)
        embeddings = self.model.embeddings(microbatch)
        result = Result(microbatch.epoch, microbatch.number, rows, tuple(timings), embeddings=embeddings)
        return now_ns + self.hop_ns, result


def linear(fixed_us: float, row_us: float) -> StageNs:
    return lambda rows: (fixed_us + row_us * rows) * 1000


@dataclass
class Simulation:
    """Runs a scheduler on fake stages; `updates` holds every sequence's updates by key."""

    scheduler: Scheduler
    stages: FakeStages
    now_ns: int = 1
    sent: deque[tuple[int, Result]] = field(default_factory=deque)
    updates: dict[int, list[Update]] = field(default_factory=dict)
    microbatches: list[ScheduledMicrobatch] = field(default_factory=list)
    check: Callable[[ScheduledMicrobatch], None] = lambda scheduled: None

    def add(self, generation: GenerationRequest) -> int:
        key = self.scheduler.add(generation, self.now_ns).key
        self.updates[key] = []
        return key

    def send_all(self) -> None:
        """Sends microbatches until the scheduler has no more."""
        while (scheduled := self.scheduler.next_microbatch(self.now_ns)) is not None:
            self.check(scheduled)
            self.microbatches.append(scheduled)
            self.sent.append(self.stages.send(scheduled, self.now_ns))

    def step(self) -> bool:
        """Completes one result; returns False when nothing is in flight."""
        self.send_all()
        if not self.sent:
            return False
        self.now_ns, result = self.sent.popleft()
        for key, updates in self.scheduler.complete(result, self.now_ns).updated:
            self.updates[key].extend(updates)
        return True

    def finish(self) -> None:
        while self.step():
            pass
        assert not self.scheduler.sequences

    def rows(self, key: int) -> list[RowResult]:
        return [update.row for update in self.updates[key] if isinstance(update, TokenSampled)]

    def embedded(self, key: int) -> dict[int, bytes]:
        """Returns hidden states by position, and asserts that each comes once."""
        found: dict[int, bytes] = {}
        for update in self.updates[key]:
            if isinstance(update, PromptEmbedded):
                size = len(update.data) // update.count
                for place in range(update.count):
                    assert update.start + place not in found
                    found[update.start + place] = update.data[place * size : (place + 1) * size]
        return found

    def scores(self, key: int) -> dict[int, RowResult]:
        """Returns scores by position of the scored token, and asserts that each is scored once."""
        found: dict[int, RowResult] = {}
        for update in self.updates[key]:
            if isinstance(update, PromptScored):
                for position, row in enumerate(update.rows, update.start):
                    assert position not in found
                    found[position] = row
        return found


def expected(
    generation: GenerationRequest, context_length: int
) -> tuple[list[RowResult], dict[int, RowResult], FinishReason]:
    """Returns what a request must give on every cluster: (sampled rows, scored rows by position, finish reason)."""
    tokens = list(generation.prompt)
    scored = {}
    if generation.score_from is not None:
        for position in range(max(generation.score_from, 1), len(tokens)):
            task = ScoreTask(tokens[position], generation.top_logprobs)
            scored[position] = answer(tokens[:position], task)
    rows: list[RowResult] = []
    chain = generation.params.chain
    mu = chain.first_mu if chain else 0.0
    while len(rows) < generation.max_new_tokens and len(tokens) < context_length:
        history = tuple(tokens[-generation.history_window :]) if generation.history_window else ()
        suppressed = generation.delayed_ids if len(rows) < generation.min_tokens else ()
        task_now = SampleTask(
            generation.params,
            generation.seed,
            generation.choice,
            len(tokens),
            history,
            suppressed,
            generation.top_logprobs,
            penalty_window=generation.penalty_window if generation.params.needs_history else None,
            dry_window=generation.dry_window if generation.looks_for_repetitions else None,
            breakers=SeenBreakers(generation.breakers, tokens).sequences if generation.breakers else (),
            mu=mu,
        )
        rows.append(answer(tokens, task_now))
        tokens.append(rows[-1].token)
        mu = mu if rows[-1].mu is None else rows[-1].mu
        if tokens[-1] in generation.stop_token_ids:
            return rows, scored, FinishReason.STOP
    return rows, scored, FinishReason.LENGTH


class FakePipeline:
    """A `Pipeline` of stages that answer at once, except while `gate` is clear."""

    def __init__(self, kv_blocks: int, stages: int = 2) -> None:
        self.epoch = 1
        self.stages = tuple(StageInfo(f"w{i}", i * 2, i * 2 + 2) for i in range(stages))
        self.workers = frozenset(stage.worker for stage in self.stages)
        self.fake = FakeStages(FakeModel(kv_blocks), [linear(100, 10)] * stages)
        self.microbatches: list[Microbatch] = []
        self.failure: str | None = None  # of results without an entry in `failures`
        self.failures: dict[int, str] = {}  # by the microbatch's number
        self.without_rows: int | None = None  # the number of a result that breaks the protocol: it has no rows
        self.together = 1  # most results in one call
        self.most_together = 0  # most results in a call so far
        self.kv_disks: KvDisks | None = None
        self.encoder: PipelineEncoder | None = None
        self.no_images = ""
        self.replaced: Result | None = None  # comes instead of each result
        self.gate = asyncio.Event()
        self.taken = asyncio.Event()  # set when a microbatch is submitted
        self.gate.set()
        self._results: asyncio.Queue[Result | Exception] = asyncio.Queue()

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        for each in scheduled:
            self.microbatches.append(each.microbatch)
            self.taken.set()
            _, result = self.fake.send(each, 0)
            self._results.put_nowait(result)

    def prepare_matchers(self) -> None:
        """Does nothing, since the model has no matchers."""

    def lose(self, error: Exception) -> None:
        """Replaces all pending results by this error."""
        while not self._results.empty():
            self._results.get_nowait()
        self._results.put_nowait(error)
        self.gate.set()

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        while True:
            results = [await self._results.get()]
            await asyncio.sleep(0)  # other tasks run first, as with a stream
            await self.gate.wait()
            while len(results) < self.together and not self._results.empty():
                results.append(self._results.get_nowait())
            self.most_together = max(self.most_together, len(results))
            on_results([self.replaced or self._answer(result) for result in results])

    def _answer(self, result: Result | Exception) -> Result:
        if isinstance(result, Exception):
            raise result
        rows = () if result.number == self.without_rows else result.rows
        return replace(result, rows=rows, failure=self.failures.get(result.number, self.failure))

    async def close(self) -> None:
        self.gate.clear()


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [event.row.token for event in events if isinstance(event, TokenSampled)]


def reason_of(updates: Sequence[Update]) -> FinishReason:
    last = updates[-1]
    assert isinstance(last, Finished)
    return last.reason
