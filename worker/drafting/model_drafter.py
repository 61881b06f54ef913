"""A draft model, which drafts greedily or with the answer's random numbers. Calls block, and are not thread-safe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter_ns

from llamaclust.core.drafts import DraftOrder, DraftReplies, DraftReply
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.worker.drafting.caches import SequenceCache, SequenceCaches
from llamaclust.worker.stage.stage_runner import StageRunner

MOST_ROWS = 256
_MOST_BESIDE = 8
"""A sequence with more uncached tokens than this is prefilled before the first drafting step."""


class ModelDrafter:
    def __init__(self, stage: StageRunner, vocabulary: int) -> None:
        self._stage = stage
        self._vocabulary = vocabulary
        self._caches = SequenceCaches(stage.limits.kv_blocks)

    def draft(self, orders: Sequence[DraftOrder]) -> DraftReplies:
        """Drafts tokens. An order gets no draft if memory is short, or if its tokens are too many or unknown."""
        kept = {order.key for order in orders}
        drafting: list[_Drafting] = []
        replies = {order.key: DraftReply(order.key, order.length, order.most > 0, (), 0) for order in orders}
        rows, began_ns = 0, perf_counter_ns()
        for order in orders:
            most = min(order.most, self._stage.limits.max_context_tokens - order.length)
            cache = self._caches.of(order, order.length + most, kept) if most >= 0 else None
            if cache is None or not self._knows(order, len(cache.tokens)):
                continue
            lacking = order.length - len(cache.tokens)
            if lacking > _MOST_BESIDE or not most:
                rows += self._take_in(order, cache)
            if lacking <= MOST_ROWS and most:
                drafting.append(_Drafting(order, cache, most))
            replies[order.key] = replace(replies[order.key], taken_in=len(cache.tokens))
        rows_ns = perf_counter_ns() - began_ns
        steps = self._draft(drafting)
        for each in drafting:
            taken_in = 0 if each.has_failed else min(len(each.cache.tokens), each.order.length)
            reply = replies[each.order.key]
            replies[each.order.key] = replace(reply, tokens=tuple(each.drafted), taken_in=taken_in)
        steps_ns = perf_counter_ns() - began_ns - rows_ns
        return DraftReplies(tuple(replies.values()), rows, rows_ns, steps, steps_ns)

    def _knows(self, order: DraftOrder, start: int) -> bool:
        task = order.task
        named = (*task.suppressed, *(token for token, _ in task.params.logit_bias))
        return max((*order.tokens[start : order.length], *named)) < self._vocabulary

    def _take_in(self, order: DraftOrder, cache: SequenceCache) -> int:
        start = len(cache.tokens)
        tokens = tuple(order.tokens[start : min(order.length - 1, start + MOST_ROWS)])
        if tokens:
            self._run((Chunk(tokens, start, cache.table, 0),))
            cache.tokens += tokens
            cache.settled = len(cache.tokens)
        return len(tokens)

    def _draft(self, drafting: list[_Drafting]) -> int:
        steps = 0
        while drafting := [each for each in drafting if len(each.drafted) < each.most and not each.has_failed]:
            tasks = tuple(each.task for each in drafting)
            for each, row in zip(drafting, self._run(tuple(each.chunk() for each in drafting), tasks), strict=True):
                each.take(row)
            steps += 1
        return steps

    def _run(self, chunks: tuple[Chunk, ...], tasks: tuple[SampleTask, ...] = ()) -> tuple[RowResult, ...]:
        logits = self._stage.run_to_sample(Microbatch(self._stage.model_id, 1, 0, chunks))
        return self._stage.finish(logits, SamplingInputs(1, 0, tasks)) if tasks else ()

    def close(self) -> None:
        self._stage.close()


class _Drafting:
    def __init__(self, order: DraftOrder, cache: SequenceCache, most: int) -> None:
        self.order = order
        self.cache = cache
        self.most = most
        self.drafted: list[int] = []
        self.task = order.task
        self.has_failed = False

    def chunk(self) -> Chunk:
        start = len(self.cache.tokens)
        tokens = (*self.order.tokens[start : self.order.length], *self.drafted[max(0, start - self.order.length) :])
        self.cache.tokens += tokens
        return Chunk(tokens, start, self.cache.table, 1)

    def take(self, row: RowResult) -> None:
        if row.failure is not None:
            self.has_failed = True
            return
        self.drafted.append(row.token)
        self.task = self.task.next()
