"""Tests that a draft model drafts the tokens that it would generate, whatever was drafted or rejected before."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.launchers.models.draft_model import LoadedDraftModel, open_draft_model, plan_draft_model
from llamaclust.core.drafts import MOST_ORDERS, DraftOrder, DraftReply
from llamaclust.core.errors import UsageError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.backend import Float32
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.messages import SamplingInputs
from llamaclust.worker.drafting.model_drafter import MOST_ROWS
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

VOCABULARY = 320
CONTEXT = 512


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=2, hidden=64, ffn=64, heads=4)


@pytest.fixture
def model(path: Path) -> Iterator[LoadedDraftModel]:
    with Model.open(path) as target, open_draft_model(plan_draft_model(path, [target], 1, CONTEXT)) as opened:
        yield opened


def drafts_of(model: LoadedDraftModel, *orders: DraftOrder) -> list[DraftReply]:
    return list(model._drafter.draft(orders).replies)


def order(key: int, tokens: list[int], most: int, task: SampleTask | None = None) -> DraftOrder:
    return DraftOrder(key, tokens, len(tokens), most, task or SampleTask(SamplingParams(), 0, 0, len(tokens)))


def test_drafts_are_the_models_own_answers(path: Path, model: LoadedDraftModel) -> None:
    """Sequences grow by accepted and other tokens, several are drafted together, and memory does not suffice for
    all."""
    source = Random(SEED)
    drawn = SamplingParams(temperature=1.0, top_k=40)
    texts = {key: [source.randrange(3, VOCABULARY) for _ in range(source.choice([3, 40, 150]))] for key in range(9)}
    with LocalClient(path, threads=1, settings=LocalSettings(CONTEXT, speculation=False)) as client:
        for _ in range(60):
            keys = source.sample(sorted(texts), source.randint(1, 3))
            params = source.choice([SamplingParams(), drawn])
            orders = [
                order(
                    key,
                    texts[key],
                    source.randint(1, 9),
                    SampleTask(params, key, 0, len(texts[key]), suppressed=(2,)),
                )
                for key in keys
            ]
            for each, reply in zip(orders, drafts_of(model, *orders), strict=True):
                said = client.generate(
                    each.tokens,
                    max_tokens=each.most,
                    ignore_eos=True,
                    temperature=params.temperature,
                    top_k=params.top_k,
                    top_p=1.0,
                    min_p=0.0,
                    seed=each.key,
                )
                assert reply.tokens == tuple(row.token for row in said.rows), f"seed {SEED}"
                texts[each.key] += reply.tokens[: source.randint(0, each.most)]
                texts[each.key] += [source.randrange(3, VOCABULARY) for _ in range(source.choice([0, 1, 3]))]


def test_unknown_tokens_get_no_draft(model: LoadedDraftModel) -> None:
    known, unknown = order(1, [3, 4, 5], 3), order(2, [3, VOCABULARY, 5], 3)
    named = order(3, [3, 4, 5], 3, SampleTask(SamplingParams(logit_bias=((VOCABULARY, 1.0),)), 0, 0, 3))
    assert [len(reply.tokens) for reply in drafts_of(model, known, unknown, named)] == [3, 0, 0]


def test_logits_that_are_not_finite_end_that_draft_alone(
    model: LoadedDraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = [order(key, [3 + key] * 9, 5) for key in (0, 2, 1)]
    expected = drafts_of(model, *healthy)
    finish = StageRunner.finish

    def damaged(self: StageRunner, logits: Float32, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        rows = finish(self, logits, inputs)
        bad = [isinstance(task, SampleTask) and (task.seed, task.position) >= (2, 9 + 2) for task in inputs.tasks]
        return tuple(
            RowResult(-1, nan, failure="not finite") if is_bad else row for is_bad, row in zip(bad, rows, strict=True)
        )

    monkeypatch.setattr(StageRunner, "finish", damaged)
    hurt = [order(key, [3 + key] * 9, 5, SampleTask(SamplingParams(), key, 0, 9)) for key in (0, 2, 1)]
    first, second, third = drafts_of(model, *hurt)
    assert [first, third] == [expected[0], expected[2]]
    assert second.tokens == expected[1].tokens[:2], "those before it are drafts"
    assert second.taken_in == 0, "the scheduler does not ask for this sequence again"


def test_a_model_without_finite_logits_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = lambda self, logits, inputs: tuple(RowResult(-1, nan, failure="x") for _ in inputs.tasks)  # noqa: E731
    monkeypatch.setattr(StageRunner, "finish", bad)
    told = r"draft model .*tiny.gguf: its logits are not finite, so it drafts nothing; name another"
    with Model.open(path) as target, pytest.raises(UsageError, match=told):
        open_draft_model(plan_draft_model(path, [target], 1, CONTEXT))


@pytest.mark.parametrize("context", [40, MOST_ROWS, MOST_ROWS + 1])
def test_short_contexts(path: Path, context: int) -> None:
    with Model.open(path) as target, open_draft_model(plan_draft_model(path, [target], 1, context)) as opened:
        assert 0 < opened.times.draft_ns(1, 1, 1) < 1e9
        (reply,) = drafts_of(opened, order(1, [3] * 30, 5))
        assert len(reply.tokens) == 5
    with Model.open(path) as target, pytest.raises(UsageError, match="a context of 16 tokens is too short"):
        plan_draft_model(path, [target], 1, 16)


def test_a_model_that_is_made_for_short_contexts_is_refused(path: Path, tmp_path: Path) -> None:
    short = build_tiny_model(tmp_path / "short.gguf", layers=1, hidden=64, ffn=64, heads=4, context=16)
    told = r"draft model .*short.gguf is made for 16 tokens, but needs 32 or more; name another"
    with Model.open(path) as target, pytest.raises(UsageError, match=told):
        plan_draft_model(short, [target], 1, CONTEXT)


def test_a_prompt_that_never_fits_takes_no_memory_from_others(model: LoadedDraftModel) -> None:
    (before,) = drafts_of(model, order(1, [3] * 100, 4))
    (refused,) = drafts_of(model, order(2, [3] * (CONTEXT + 10), 4))
    (again,) = drafts_of(model, order(1, [3] * 100, 4))
    assert (refused.tokens, refused.taken_in) == ((), 0)
    assert before.tokens == again.tokens and model._drafter._caches._caches[1].tokens


def test_long_prompts_are_taken_in_by_parts(model: LoadedDraftModel) -> None:
    tokens = [3 + place % 300 for place in range(MOST_ROWS + 50)]
    (first,) = drafts_of(model, order(1, tokens, 4))
    assert (first.tokens, first.taken_in) == ((), MOST_ROWS), "a sequence that waits does not wait for that"
    (second,) = drafts_of(model, order(1, tokens, 0))
    assert second.taken_in == len(tokens) - 1
    (third,) = drafts_of(model, order(1, tokens, 4))
    assert len(third.tokens) == 4 and third.taken_in == len(tokens)


def test_drafts_end_with_the_context_and_with_memory(model: LoadedDraftModel) -> None:
    tokens = [3] * (CONTEXT - 2)
    for _ in range(3):
        drafts_of(model, order(1, tokens, 0))
    (reply,) = drafts_of(model, order(1, tokens, 9))
    assert len(reply.tokens) == 2
    many = [order(key, [key] * 250, 8) for key in range(MOST_ORDERS)]
    drafted = [bool(each.tokens) for each in drafts_of(model, *many)]
    assert any(drafted) and not all(drafted), "they are in memory together, or not at all"
    assert all(each.taken_in == 0 for each in drafts_of(model, *many) if not each.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 512}, "its 512 tokens differ from the 320 tokens of"),
        ({"architecture": "qwen2"}, "its 320 tokens differ from the 320 tokens of"),
    ],
)
def test_a_model_of_other_tokens_is_refused(path: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    other = build_tiny_model(tmp_path / "other.gguf", layers=1, hidden=64, ffn=64, heads=4, **changes)  # type: ignore[arg-type]
    with Model.open(path) as target, pytest.raises(UsageError, match=f"draft model .*other.gguf: {message}"):
        plan_draft_model(other, [target], 1, CONTEXT)
