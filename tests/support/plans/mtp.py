"""MTP heads that draft even if it does not pay, and fake MTP heads on a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import pytest

from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.speculation.mtp_drafts import MtpDrafts
from llamaclust.core.sampler.tasks import ScoreTask
from llamaclust.wire.microbatch.messages import Result
from llamaclust.worker.stage.nextn import following
from support.clusters.fakes import FakeStages


@dataclass
class AnyLengths:
    """Replaces the choice of draft lengths that pay by random lengths."""

    source: random.Random
    most: int
    asked: int = field(default=0, init=False)

    def length(self, sequences: Items[Sequence], speed: float, groups: int, most: int) -> int:
        count = min(most, self.source.randint(0, self.most))
        self.asked += count > 0
        return count


def order_any(source: random.Random, most: int, monkeypatch: pytest.MonkeyPatch) -> AnyLengths:
    lengths = AnyLengths(source, most)
    monkeypatch.setattr(MtpDrafts, "length", lengths.length)
    return lengths


@dataclass
class MtpStages(FakeStages):
    """Stages whose last one has an MTP head: `says` returns drafted tokens from a position on, up to a number, and each
    token takes `draft_ns`."""

    says: Callable[[int, int], tuple[int, ...]] = lambda position, most: ()
    draft_ns: int = 0
    asked: int = 0  # tokens

    def send(self, scheduled: ScheduledMicrobatch, now_ns: int) -> tuple[int, Result]:
        back_ns, result = super().send(scheduled, now_ns)
        rows, at, most = list(result.rows), 0, 0
        for chunk in scheduled.microbatch.chunks:
            tasks = scheduled.inputs.tasks[at : at + chunk.outputs]
            says = [row.token for row in rows[at : at + chunk.outputs]]
            scored = [isinstance(task, ScoreTask) for task in tasks]
            _, chosen = following(chunk.tokens, chunk.next_token, says, scored)
            if chunk.drafts and chosen is not None:
                row, place = at + chosen, chunk.position + len(chunk.tokens) - chunk.outputs + chosen + 2
                rows[row] = replace(rows[row], drafted=self.says(place, chunk.drafts))
                most = max(most, chunk.drafts)
            at += chunk.outputs
        drafting_ns = most * self.draft_ns
        self.asked += most
        self.free_at[-1] += drafting_ns
        return back_ns + drafting_ns, replace(result, rows=tuple(rows), drafting_ns=drafting_ns)
