"""Tests of image rows in the scheduler: chunks, block keys, drafts and refusals, on a fake model that sees them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.kv.blocks import KvBlocks
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys, PrefixCache
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan
from llamaclust.cluster.scheduler.rows.images import SequenceImages
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.mtp_drafts import MtpDrafts
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.model.kv_type import KvType
from support.clusters.fakes import VOCABULARY, FakeStages, Simulation, linear
from support.plans.draft_models import DraftingSimulation, SaidModel, wait_for_any
from support.plans.drafting import AnyChains, AnyWindows, SaidDrafters, replayed
from support.plans.image_requests import (
    IMAGE_WIDTH,
    SECTIONS,
    SeeingModel,
    expected_tokens,
    picture,
    random_pictures,
    text,
    with_pictures,
)
from support.plans.mtp import AnyLengths, MtpStages
from support.plans.simulations import check_writes

ROW_BYTES = 4 * IMAGE_WIDTH
SETTINGS = SchedulerSettings(
    "m",
    VOCABULARY,
    context_length=220,
    kv_blocks=64,
    max_sequences=4,
    max_batch_tokens=48,
    max_outputs=32,
    image_width=IMAGE_WIDTH,
    rope_sections=SECTIONS,
)
LONGEST = SETTINGS.max_group_rows


def simulation(chosen: SchedulerSettings = SETTINGS, stages: int = 2, hop_us: float = 1.0) -> Simulation:
    fake = FakeStages(SeeingModel(chosen.kv_blocks), [linear(100, 10)] * stages, round(1000 * hop_us))
    return Simulation(Scheduler(chosen, 1, stages), fake)


def random_request(source: random.Random, kind: str) -> GenerationRequest:
    """Draws a request; one in four has no pictures."""
    params = source.choice([SamplingParams(), SamplingParams(), SamplingParams(repetition_penalty=1.2)])
    request = GenerationRequest(
        "r", text(source, source.randint(1, 40)), source.choice([1, 5, 30]), params, source.randrange(3)
    )
    request = replace(request, penalty_window=source.choice([3, 64]))
    if source.random() < 0.25:
        return request
    beginning = with_pictures(
        replace(request, prompt=(7, 8, 9)), random_pictures(source, 3, LONGEST, kind=kind)[: source.randint(1, 3)]
    )
    return replace(beginning, prompt=(*beginning.prompt, *request.prompt[: source.choice([0, 1, 9, 40])]))


def check_chunks(run: Simulation) -> None:
    """Makes the simulation check the limits of every microbatch, and that groups are whole."""
    check_writes(run)
    check, limits = run.check, run.scheduler.settings

    def also(scheduled: ScheduledMicrobatch) -> None:
        check(scheduled)
        assert scheduled.microbatch.rows <= limits.max_batch_tokens
        assert sum(chunk.image_bytes for chunk in scheduled.microbatch.chunks) <= limits.max_image_bytes

    run.check = also


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_answers_depend_on_nothing_but_prompts_and_pictures(seed: int) -> None:
    source = random.Random(seed)
    kind = source.choice(["plain", "turned", "bidirectional"])
    requests = [random_request(source, kind) for _ in range(source.randint(1, 12))]
    answers = [expected_tokens(request) for request in requests]
    texts = [[*request.prompt, *answer] for request, answer in zip(requests, answers, strict=True)]
    says = SaidDrafters(replayed(texts, source.choice([0.5, 1.0]), source, VOCABULARY))
    chosen = replace(
        SETTINGS,
        kv_blocks=source.randint(14, 60),
        max_sequences=source.randint(1, 4),
        max_image_bytes=source.choice([LONGEST, 2 * LONGEST, 1000]) * ROW_BYTES,
        prefill_chunk=source.choice([None, 1, 5, 16, 40]),
        prefix_cache=source.random() < 0.8,
        speculation=source.choice([None, SpeculationSettings(says)]),
    )
    run = simulation(chosen, source.randint(1, 3), source.choice([0.0, 1.0, 1000.0]))
    check_chunks(run)
    keys: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "best_windows", AnyWindows(source, 8))
        patch.setattr(speculation, "best_chain", AnyChains(source, 4))
        for request in requests:
            keys.append(run.add(request))
            for _ in range(source.choice([0, 0, 1, 5, 20])):
                run.step()
            if source.random() < 0.1:
                run.send_all()
                run.sent.clear()
                run.stages = FakeStages(SeeingModel(chosen.kv_blocks), [linear(100, 10)] * len(run.stages.stage_ns))
                run.scheduler.restart(chosen, run.scheduler.in_flight.epoch + 1, len(run.stages.stage_ns))
        run.finish()
    for key, answer in zip(keys, answers, strict=True):
        assert [row.token for row in run.rows(key)] == answer
    assert run.scheduler.counts.kv_blocks_held == 0


def prompt_with(span: ImageSpan, question: int = 1, before: int = 0) -> GenerationRequest:
    """Makes a prompt of `before` tokens, a picture and a question."""
    return with_pictures(GenerationRequest("r", (5,) * before + (question,) * 30, 3), [(before, span)])


def cached(requests: Sequence[GenerationRequest]) -> list[int]:
    """Returns the number of cached tokens of each request, one after the other."""
    run, found = simulation(), []
    for request in requests:
        before = run.scheduler.counts.cached_tokens
        key = run.add(request)
        run.finish()
        assert [row.token for row in run.rows(key)] == expected_tokens(request)
        found.append(run.scheduler.counts.cached_tokens - before)
    return found


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_second_question_to_the_same_picture_finds_it_in_the_prefix_cache(bidirectional: bool) -> None:
    span = picture(1, 40, bidirectional=bidirectional)
    assert cached([prompt_with(span), prompt_with(span, question=2)]) == [0, 32]


@pytest.mark.parametrize(
    "other", [picture(2, 40), replace(picture(1, 40), offset=1), picture(1, 40, bidirectional=True), picture(1, 41)]
)
def test_another_picture_is_not_found(other: ImageSpan) -> None:
    assert cached([prompt_with(picture(1, 40)), prompt_with(other)]) == [0, 0]


def test_zeros_are_not_taken_for_a_picture() -> None:
    asked = prompt_with(picture(1, 40))
    assert cached([asked, replace(asked, images=()), asked]) == [0, 0, 64]


def test_a_picture_elsewhere_in_a_block_is_another_one() -> None:
    span = picture(1, 40)
    shifted = replace(prompt_with(span, before=3), prompt=(0,) * 3 + (0,) * 40 + (1,) * 30)
    assert cached([replace(prompt_with(span, before=0), prompt=(0,) * 43 + (1,) * 30), shifted]) == [0, 0]


def test_rows_that_see_each_other_are_never_divided_and_never_starve() -> None:
    """Meanwhile other requests decode, and shorter prompts keep coming."""
    run = simulation(replace(SETTINGS, prefill_chunk=16))
    check_chunks(run)
    long = with_pictures(
        GenerationRequest("r", text(random.Random(1), 90), 5), [(3, picture(1, LONGEST, bidirectional=True))]
    )
    for start in range(2):
        run.add(GenerationRequest("decodes", (start, 1, 2), 120))
    run.step()
    key = run.add(long)
    for number in range(40):
        run.add(GenerationRequest("short", (number, 2, 3, 4, 5), 1))
        run.step()
        if any(len(chunk.tokens) >= LONGEST for chunk in run.microbatches[-1].microbatch.chunks):
            break
    else:
        pytest.fail("the picture was not computed")
    run.finish()
    assert [row.token for row in run.rows(key)] == expected_tokens(long)


def test_a_chunk_takes_as_many_rows_of_images_as_a_microbatch_may_have() -> None:
    chosen = replace(SETTINGS, max_image_bytes=10 * ROW_BYTES, prefill_chunk=40)
    run = simulation(chosen)
    check_chunks(run)
    run.add(with_pictures(GenerationRequest("r", (1,) * 20, 2), [(4, picture(1, 25))]))
    run.finish()
    assert [len(each.microbatch.chunks[0].tokens) for each in run.microbatches[:3]] == [14, 10, 21]


def test_rope_positions_go_on_behind_a_picture() -> None:
    places = np.stack([np.zeros(12), np.arange(12) // 4, np.arange(12) % 4]).astype(np.int32)
    span = replace(picture(1, 12), rope_positions=places)
    run = simulation()
    key = run.add(with_pictures(GenerationRequest("r", (1,) * 8, 6), [(2, span)]))
    run.finish()
    chunks = [chunk for each in run.microbatches for chunk in each.microbatch.chunks]
    turned = [
        np.frombuffer(chunk.images.rope_positions, np.int32).reshape(-1, SECTIONS) for chunk in chunks if chunk.images
    ]
    assert np.concatenate(turned)[:, 1].tolist() == [0, 1, *[2] * 4, *[3] * 4, *[4] * 4, *range(6, 17)]
    assert len(run.rows(key)) == 6


class CountedSpans(list[ImageSpan]):
    """A list that counts how often a span is read."""

    read = 0

    def __getitem__(self, place: SupportsIndex | slice) -> Any:
        self.read += 1
        return super().__getitem__(place)

    def __iter__(self) -> Iterator[ImageSpan]:
        self.read += len(self)
        return super().__iter__()


@pytest.mark.parametrize("kind", ["plain", "turned"])
def test_spans_are_read_once_however_many_there_are(kind: str) -> None:
    """A prompt of 64 images with many spans would otherwise stop every stream for seconds."""
    one = picture(1, 40, turned=kind == "turned")
    request = with_pictures(GenerationRequest("r", (5,) * 1000, 3), [(place, one) for place in range(1000)])
    tokens = request.prompt
    spans = CountedSpans(request.images)
    keys = BlockKeys(images=spans)
    PrefixCache(KvBlocks(4), "m", KvType.F16).find(keys, tokens, len(tokens))
    assert len(keys) == len(tokens) // 16
    assert spans.read < 2 * len(spans) + 2 * len(keys)
    images = SequenceImages(spans)
    images._placed = placed = CountedSpans(images._placed)  # type: ignore[assignment, arg-type]
    for position in range(0, len(tokens), 16):
        images.rows_of(position, 16)
    for position in range(len(tokens), len(tokens) + 1000):
        images.rows_of(position, 1)
    assert placed.read < 1000 + 3 * len(keys)


def test_no_model_drafts_behind_a_picture() -> None:
    asked, plain = prompt_with(picture(1, 40)), GenerationRequest("r", (4,) * 30, 60)
    for request, is_asked in ((replace(asked, max_new_tokens=60), False), (plain, True)):
        model = SaidModel(lambda tokens, most: (1,) * most, 1, 1)
        own = SpeculationSettings(SaidDrafters(lambda tokens, most: ()), draft_model=model)
        fake = FakeStages(SeeingModel(64), [linear(100, 10)] * 2)
        run = DraftingSimulation(Scheduler(replace(SETTINGS, speculation=own), 1, 2), fake)
        with pytest.MonkeyPatch.context() as patch:
            wait_for_any(random.Random(1), 8, patch)
            key = run.add(request)
            run.finish()
        assert bool(model.asked) == is_asked
        assert [row.token for row in run.rows(key)] == expected_tokens(request)


def test_no_head_drafts_behind_a_picture() -> None:
    source = random.Random(1)
    silent = SaidDrafters(lambda tokens, most: ())
    for request, is_asked in ((prompt_with(picture(1, 40)), False), (GenerationRequest("r", (4,) * 30, 9), True)):
        run = simulation(replace(SETTINGS, speculation=SpeculationSettings(silent, mtp=True)))
        stages = run.stages
        run.stages = MtpStages(stages.model, stages.stage_ns, stages.hop_ns, says=lambda position, most: (1,) * most)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MtpDrafts, "length", AnyLengths(source, 8).length)
            run.add(replace(request, max_new_tokens=40))
            run.finish()
        chunks = [chunk for each in run.microbatches for chunk in each.microbatch.chunks]
        assert any(chunk.drafts or chunk.next_token is not None for chunk in chunks) == is_asked


REFUSED = {
    "the model does not take images": (replace(SETTINGS, image_width=0), prompt_with(picture(1, 40))),
    "from text only": (SETTINGS, replace(prompt_with(picture(1, 40)), score_from=1)),
    "from text only: remove": (SETTINGS, replace(prompt_with(picture(1, 40)), max_new_tokens=0, embedded=(0, 9))),
    "expected 40 rows of 6 numbers, found 40 x 3": (replace(SETTINGS, image_width=6), prompt_with(picture(1, 40))),
    "45 rows in one microbatch; the limit is 44: set prefill_chunk to 45": (
        SETTINGS,
        prompt_with(picture(1, 45, bidirectional=True)),
    ),
    "480 bytes in one microbatch; the limit is 479": (
        replace(SETTINGS, max_image_bytes=479),
        prompt_with(picture(1, 40, bidirectional=True)),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_images_that_cannot_be_computed_are_refused_by_name(reason: str) -> None:
    chosen, request = REFUSED[reason]
    with pytest.raises(ParameterError, match=f"images.*{reason}"):
        simulation(chosen).add(request)
