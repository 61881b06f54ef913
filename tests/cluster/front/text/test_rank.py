"""Tests of prompts of a query and its documents: refusals, after which no further text is tokenized."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import ContextLengthError, ParameterError, QueueFullError
from llamaclust.model.ranking import PairTemplate, Ranking
from llamaclust.model.tokenizers.pairs import PairForm
from support.clusters.fakes import FakePipeline
from support.clusters.served import CONTEXT, SETTINGS, ids, make_service, real_engine

BEGIN, BETWEEN = 5, 7
FORM = PairForm((BEGIN,), (BETWEEN,), ())


def ranking(engine: Engine) -> TextService:
    service = make_service(engine)
    service.settings = replace(service.settings, ranking=Ranking(FORM, of_last=False))
    return service


async def read_until_refused(
    query: str, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], ContextLengthError]:
    """Returns the tokenized texts and the error."""
    service = ranking(Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS))
    encode, read = service.tokenizer.encode, list[str]()

    def recorded(text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        read.append(text)
        return encode(text, add_special, parse_special)

    monkeypatch.setattr(service.tokenizer, "encode", recorded)
    with pytest.raises(ContextLengthError) as refused:
        await service.rank(query, documents)
    assert not service.budget.shares.held
    return read, refused.value


async def test_a_query_that_fills_the_context_is_refused_before_any_document(monkeypatch: pytest.MonkeyPatch) -> None:
    query = "1" * (CONTEXT - FORM.length + 1)
    read, refused = await read_until_refused(query, ["b"] * 2048, monkeypatch)
    assert read == [query]
    assert str(refused).startswith(f"query: has {CONTEXT + 1} tokens")


async def test_documents_behind_one_that_is_too_long_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "1" * (CONTEXT - FORM.length - 2)
    read, refused = await read_until_refused("123", ["1", long, *["b"] * 2000], monkeypatch)
    assert read == ["123", "1", long]
    assert str(refused).startswith(f"documents: one document with the query has {CONTEXT + 1} tokens")


async def test_a_prompt_may_fill_the_context_and_control_words_of_texts_stay_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = "<|im_end|>"
    longest = "1" * (CONTEXT - FORM.length - len(ids(query)))
    async with real_engine() as (engine, _):
        submit, prompts = engine.submit, list[tuple[int, ...]]()

        def recorded(request: GenerationRequest) -> RequestStream:
            prompts.append(request.prompt)
            return submit(request)

        monkeypatch.setattr(engine, "submit", recorded)
        service = ranking(engine)
        ranks = await service.rank(query, [longest])
        await service.aclose()
    assert prompts == [(BEGIN, *ids(query), BETWEEN, *ids(longest))]
    assert [rank.prompt_tokens for rank in ranks] == [CONTEXT]
    assert service.tokenizer.token_id(query) not in prompts[0]


async def test_prompts_count_for_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that the query counts in each prompt: 3 * (2 + 4 + 1) tokens are 5 entries."""
    async with real_engine() as (engine, _):
        service = ranking(engine)
        monkeypatch.setattr("llamaclust.cluster.front.text.sharing.MAX_REPLY_ENTRIES", 4)
        with pytest.raises(
            ParameterError, match="documents: the documents, each with the query, have 21 tokens; the limit is 20"
        ):
            await service.rank("1234", ["1", "2", "3"])
        monkeypatch.undo()
        monkeypatch.setattr(service.budget.shares, "room", 4)
        with pytest.raises(QueueFullError):
            await service.rank("1234", ["1", "2", "3"])
        monkeypatch.setattr(service.budget.shares, "room", 5)
        assert len(await service.rank("1234", ["1", "2", "3"])) == 3
        assert not service.budget.shares.held
        await service.aclose()


TEMPLATE = "{query} {document}"


def rendering(engine: Engine) -> TextService:
    service = make_service(engine)
    service.settings = replace(service.settings, ranking=Ranking(PairTemplate(TEMPLATE), of_last=True))
    return service


async def test_rendered_prompts_that_are_too_long_are_refused_in_order() -> None:
    service = rendering(Engine(FakePipeline(SETTINGS.kv_blocks), SETTINGS))
    with pytest.raises(ContextLengthError, match=r"^query: has"):
        await service.rank("1" * (CONTEXT + 1), ["b"] * 2048)
    with pytest.raises(ContextLengthError, match=r"^documents: one document with the query has"):
        await service.rank("123", ["1", "1" * CONTEXT, "2"])
    assert not service.budget.shares.held


async def test_rendered_prompts_count_for_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real_engine() as (engine, _):
        service = rendering(engine)
        documents = ["1", "2", "3"]
        tokens = sum(len(ids(f"1234 {document}")) for document in documents)
        monkeypatch.setattr(service.budget.shares, "room", -(-tokens // 5) - 1)
        with pytest.raises(QueueFullError):
            await service.rank("1234", documents)
        monkeypatch.setattr(service.budget.shares, "room", -(-tokens // 5))
        assert [rank.prompt_tokens for rank in await service.rank("1234", documents)] == [tokens // 3] * 3
        assert not service.budget.shares.held
        await service.aclose()
