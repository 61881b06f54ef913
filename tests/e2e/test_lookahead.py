"""Tests of lookahead: decode steps that are submitted before the previous token is known."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.sampler.params import SamplerChain, SamplerName, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SampledTokens, SamplingInputs
from llamaclust.wire.rpc.client import StreamBrokenError
from llamaclust.wire.rpc.methods import SAMPLED_TOKENS
from llamaclust.worker.stage.dependencies import Dependencies
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.clusters.stage_chain import DEADLINES, chain, runner_of
from support.models.tiny_model import build_tiny_model
from support.wire.plain_tokens import PlainTokensBox, sampled_tokens_of

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=512, kv_blocks=128)
STEPS = 6


def simulated(stages: int, stage_us: float, hop_us: float) -> Simulation:
    fake = FakeStages(FakeModel(SETTINGS.kv_blocks), [linear(stage_us, 1)] * stages, round(hop_us * 1000))
    return Simulation(Scheduler(SETTINGS, epoch=1, stages=stages), fake)


def generation(max_new_tokens: int, **fields: object) -> GenerationRequest:
    return GenerationRequest("r", tuple(range(1, 20)), max_new_tokens, **fields)  # type: ignore[arg-type]


def steps_ahead(run: Simulation) -> int:
    return sum(any(chunk.depends_on for chunk in sent.microbatch.chunks) for sent in run.microbatches)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_do_not_wait_for_the_coordinator(stages: int) -> None:
    run = simulated(stages, stage_us=1000, hop_us=100)
    key = run.add(generation(100))
    while len(run.rows(key)) < 10:
        run.step()
    start_ns = run.now_ns
    while len(run.rows(key)) < 90:
        run.step()
    hops = 0 if stages == 1 else stages  # From stage to stage, and from the last to the first.
    assert (run.now_ns - start_ns) / 80 == pytest.approx((1001 * stages + 100 * hops) * 1000, rel=0.001)
    run.finish()
    assert steps_ahead(run) >= 95


def test_what_comes_after_the_end_is_thrown_away() -> None:
    alone = simulated(1, stage_us=1000, hop_us=100)
    key = alone.add(generation(60))
    alone.finish()
    tokens = [row.token for row in alone.rows(key)]
    stop = next(token for index, token in enumerate(tokens) if index > 20 and token not in tokens[:index])
    run = simulated(1, stage_us=1000, hop_us=100)
    request = generation(60, stop_token_ids=frozenset({stop}))
    key = run.add(request)
    run.finish()
    assert run.rows(key) == expected(request, 512)[0]
    more = run.microbatches[-1].microbatch.number + 1 - len(run.rows(key))
    assert 1 <= more <= run.scheduler.lookahead.most_steps
    assert run.scheduler.counts.kv_blocks_held == 0


@pytest.mark.parametrize(("stages", "stage_us", "most"), [(1, 3000, 6), (1, 8000, 2), (1, 21_000, 1), (2, 3000, 1)])
def test_several_short_steps_of_a_whole_model_go_ahead(stages: int, stage_us: float, most: int) -> None:
    run = simulated(stages, stage_us, hop_us=1000)
    requests = [generation(100, seed=1), generation(60, seed=2)]
    keys = [run.add(request) for request in requests]
    under_way, sent = 0, list[int]()
    while run.step():
        before = len(run.sent)
        run.send_all()
        if len(run.rows(keys[1])) in range(20, 50):
            sent += [len(run.sent) - before] * (len(run.sent) > before)
            under_way = max(under_way, len(run.sent))
    assert under_way == most + 1
    assert min(sent) == under_way - (most + 1) // 2, "none before half of them are back"
    for key, request in zip(keys, requests, strict=True):
        assert run.rows(key) == expected(request, 512)[0]


def test_steps_go_ahead_right_behind_a_long_prompt() -> None:
    stages = FakeStages(FakeModel(SETTINGS.kv_blocks), [linear(1000, 400)], 150_000)
    run = Simulation(Scheduler(SETTINGS, epoch=1, stages=1), stages)
    requests = [generation(300), GenerationRequest("long", tuple(at % VOCABULARY for at in range(400)), 100)]
    keys = [run.add(requests[0])]
    while len(run.rows(keys[0])) < 60:
        run.step()
    steady = run.scheduler.lookahead.most_steps
    keys.append(run.add(requests[1]))
    while not run.rows(keys[1]):
        run.step()
    while len(run.rows(keys[1])) < 10:
        run.send_all()
        assert len(run.sent) >= steady // 2 >= 5
        run.step()
    run.finish()
    for key, request in zip(keys, requests, strict=True):
        assert run.rows(key) == expected(request, 512)[0]


def test_all_rows_stay_together_where_one_needs_the_tokens_before_it() -> None:
    run = simulated(1, stage_us=3000, hop_us=1000)
    requests = [generation(60, seed=1), generation(60, params=SamplingParams(repetition_penalty=1.2))]
    keys = [run.add(request) for request in requests]
    under_way = 0
    while run.step():
        under_way = max(under_way, len(run.sent))
    assert steps_ahead(run) > 30 and under_way <= 2
    assert [run.rows(key) for key in keys] == [expected(request, 512)[0] for request in requests]
    assert len(run.microbatches) < 70


@pytest.mark.parametrize("window", [0, 1, 2, 64])
def test_penalties_count_the_token_that_is_not_known_yet(window: int) -> None:
    run = simulated(2, stage_us=1000, hop_us=100)
    request = generation(40, params=SamplingParams(repetition_penalty=1.2), penalty_window=window, min_tokens=30)
    key = run.add(request)
    run.finish()
    assert steps_ahead(run) > 30
    if window:
        assert run.rows(key) == expected(request, 512)[0]
    assert all(len(task.history) + task.history_rows <= window for task in tasks_of(run))


def test_mirostat_waits_for_its_state() -> None:
    """A sequence with mirostat waits for the state that arrives with a token. Other sequences use lookahead."""
    run = simulated(2, stage_us=1000, hop_us=100)
    requests = [
        generation(40, params=SamplingParams(chain=SamplerChain(mirostat=2))),
        generation(40, seed=1),
    ]
    keys = [run.add(request) for request in requests]
    run.finish()
    assert steps_ahead(run) > 20
    assert [run.rows(key) for key in keys] == [expected(request, 512)[0] for request in requests]
    assert all(task.mu and not task.history_rows for task in tasks_of(run) if task.params.needs_state)


@pytest.mark.parametrize("windows", [(64, 64), (2, 64), (64, 3)])
def test_dry_sees_the_token_that_is_not_known_yet(windows: tuple[int, int]) -> None:
    run = simulated(2, stage_us=1000, hop_us=100)
    params = SamplingParams(presence_penalty=1.0, chain=SamplerChain((SamplerName.DRY,), dry_multiplier=1.0))
    lasts = range(VOCABULARY)  # Some tokens first occur as the token that is not known yet.
    breakers = {token: ((token,), *((token, last) for last in lasts)) for token in range(0, VOCABULARY, 5)}
    request = generation(40, params=params, penalty_window=windows[0], dry_window=windows[1], breakers=breakers)
    key = run.add(request)
    run.finish()
    assert steps_ahead(run) > 30
    assert run.rows(key) == expected(request, 512)[0]


def tasks_of(run: Simulation) -> list[SampleTask]:
    return [task for sent in run.microbatches for task in sent.inputs.tasks if isinstance(task, SampleTask)]


def test_nothing_is_sent_ahead_where_it_would_save_too_little() -> None:
    """New requests would wait for such a step."""
    run = simulated(1, stage_us=50_000, hop_us=100)
    run.add(generation(30))
    run.finish()
    assert steps_ahead(run) == 0


@pytest.mark.parametrize("stage_us", [1000, 15_000])
def test_a_newcomer_waits_for_two_steps_at_most_or_twenty_milliseconds(stage_us: float) -> None:
    run = simulated(1, stage_us, hop_us=1000)
    first = run.add(generation(60))
    while len(run.rows(first)) < 20:
        run.step()
    run.send_all()
    sent, newcomer, begun_ns = len(run.microbatches), run.add(generation(5)), run.now_ns
    while not run.rows(newcomer):
        run.step()
    waited_ns = run.now_ns - begun_ns
    begun = next(i for i, one in enumerate(run.microbatches[sent:]) if len(one.microbatch.chunks) > 1)
    assert begun == 0, "what is sent next has its prompt"
    assert waited_ns < 2 * stage_us * 1000 + 22e6
    run.finish()


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return Model.open(build_tiny_model(path, hidden=64, layers=3, heads=4, ffn=96))


def task(position: int, history: tuple[int, ...], *, follows: bool = False) -> SampleTask:
    params = SamplingParams(1.5, repetition_penalty=1.3, frequency_penalty=0.4)
    return SampleTask(params, seed=5, choice=0, position=position, history=history, history_rows=int(follows))


def one_by_one(model: Model) -> list[RowResult]:
    """Computes each step after the previous token is known."""
    whole, tokens = runner_of(model, 0, 3), [1, 2, 3, 4]
    rows: list[RowResult] = []
    for step in range(STEPS):
        chunk = Chunk(tuple(tokens) if step == 0 else (tokens[-1],), 0 if step == 0 else len(tokens) - 1, (0, 2), 1)
        inputs = SamplingInputs(1, step, (task(len(tokens), tuple(tokens)),))
        rows += whole.finish(whole.run(Microbatch(model.model_id, 1, step, (chunk,)), None), inputs)
        tokens.append(rows[-1].token)
    return rows


@pytest.mark.parametrize("cuts", [(0, 3), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_stages_put_in_the_tokens_that_they_chose(model: Model, tmp_path: Path, cuts: tuple[int, ...]) -> None:
    rows = one_by_one(model)
    tokens = [1, 2, 3, 4, *(row.token for row in rows)]

    async def run() -> list[Result]:
        async with chain(model, tmp_path, cuts) as stages:
            for step in range(STEPS):  # All steps are submitted before any token is sampled.
                first = Chunk((1, 2, 3, 4), 0, (0, 2), 1)
                after = Chunk((0,), 3 + step, (0, 2), 1, (step - 1, 0))
                microbatch = Microbatch(model.model_id, 1, step, (after if step else first,))
                sampling = task(4 + step, tuple(tokens[: 3 + step] if step else tokens[:4]), follows=step > 0)
                await stages.submit(microbatch, SamplingInputs(1, step, (sampling,)))
            return [await stages.result() for _ in range(STEPS)]

    assert [row for result in asyncio.run(run()) for row in result.rows] == rows


def test_a_token_that_cannot_come_is_a_failure(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise WorkerError("it exploded")

    async def run() -> tuple[Result, Result]:
        async with chain(model, tmp_path, (0, 1, 3)) as stages:
            monkeypatch.setattr(stages.runners[0], "run_frame", explode)
            first = Microbatch(model.model_id, 1, 0, (Chunk((1,), 0, (0, 2), 1),))
            await stages.submit(first, SamplingInputs(1, 0, (task(1, ()),)))
            after = Microbatch(model.model_id, 1, 1, (Chunk((0,), 4, (0, 2), 1, (0, 0)),))
            await stages.submit(after, SamplingInputs(1, 1, (task(5, ()),)))
            failed = await stages.result()
            monkeypatch.undo()
            return failed, await stages.result()

    failed, after = asyncio.run(run())
    assert failed.failure and "it exploded" in failed.failure
    assert after.failure and "microbatch 0 sampled no token for row 0" in after.failure


def test_a_step_ahead_without_sampling_inputs_is_a_failure(model: Model, tmp_path: Path) -> None:
    async def run() -> tuple[Result, Result]:
        async with chain(model, tmp_path, (0, 3), replace(DEADLINES, sampling_inputs_s=0.2)) as stages:
            first = Microbatch(model.model_id, 1, 0, (Chunk((1,), 0, (0, 2), 1),))
            await stages.sample.write(encode_inputs(SamplingInputs(1, 0, (task(1, ()),))))
            await stages.submit(first, None)
            await stages.submit(Microbatch(model.model_id, 1, 1, (Chunk((0,), 1, (0, 2), 1, (0, 0)),)), None)
            return await stages.result(), await stages.result()

    first, after = asyncio.run(run())
    assert first.failure is None
    assert after.failure and "sampling inputs of microbatch 1 took longer than 0.2 s" in after.failure


@pytest.mark.parametrize("stage", ["first of one", "last"])
async def test_only_the_first_of_several_stages_is_told_tokens(model: Model, tmp_path: Path, stage: str) -> None:
    async with chain(model, tmp_path, (0, 3) if stage == "first of one" else (0, 1, 3)) as stages:
        with pytest.raises(StreamBrokenError, match="got sampled tokens, but is not the first of several stages"):
            await stages.last.open(SAMPLED_TOKENS, epoch=1).opened()


def test_tokens_out_of_turn_are_refused() -> None:
    box = PlainTokensBox()
    box.put(SampledTokens(3, (7,)))
    with pytest.raises(ProtocolError, match="tokens of microbatch 3 came after those of microbatch 3"):
        box.put(SampledTokens(3, (8,)))


def test_a_row_without_an_answer_counts_as_token_0() -> None:
    assert sampled_tokens_of(4, (RowResult(9, -1.0), RowResult(-1, float("nan"), failure="no"))) == SampledTokens(
        4, (9, 0)
    )


async def test_waiting_ends_with_the_stream_of_tokens() -> None:
    dependencies = Dependencies(epoch=1, inputs_s=5.0)
    waiting = asyncio.create_task(dependencies.known(0))
    await asyncio.sleep(0)
    dependencies.fail(WorkerError("the last stage is gone"))
    with pytest.raises(WorkerError, match="the last stage is gone"):
        await waiting


def test_a_history_goes_on_with_tokens_of_its_chunk_alone() -> None:
    microbatch = Microbatch("m", 1, 1, (Chunk((5,), 4, (0, 2), 1),))
    inputs = SamplingInputs(1, 1, (task(5, (1,), follows=True).next(),))
    with pytest.raises(ProtocolError, match="goes on with 2 tokens of a chunk, at its row 1"):
        PlainTokensBox().fill_inputs(inputs, microbatch)


def test_a_stage_runner_never_sees_a_token_that_is_missing(model: Model) -> None:
    """`filled` replaces the placeholder, which would otherwise be used as a token."""
    box = PlainTokensBox()
    box.put(SampledTokens(0, (7, 11)))
    chunk = Chunk((0,), 4, (0, 2), 1, (0, 1))
    assert box.filled(Microbatch(model.model_id, 1, 1, (chunk,))).chunks[0].tokens == (11,)
    with pytest.raises(WorkerError, match="microbatch 0 sampled no token for row 2: it sampled 2 tokens"):
        box.filled(Microbatch(model.model_id, 1, 1, (Chunk((0,), 4, (0, 2), 1, (0, 2)),)))
