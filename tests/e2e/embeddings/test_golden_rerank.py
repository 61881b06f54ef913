"""Compares scores and orders of `/v1/rerank` with llama.cpp's, for all forms of the request."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from support.clusters.command_line import command_line
from support.clusters.fakes import FakePipeline
from support.clusters.served import SETTINGS, client
from support.clusters.static_cluster import named
from support.models.record_rerank import DOCUMENTS, QUERY, recorded
from support.models.tiny_encoders import RANK, RERANKERS, build_encoder
from support.models.tiny_model import build_tiny_model
from support.several_models.api_models import api_model


@asynccontextmanager
async def served(path: Path, settings: ApiSettings | None = None) -> AsyncIterator[httpx.AsyncClient]:
    stage, idle = LocalStage(path, 1, None, LocalSettings(context_length=256)), Engine(FakePipeline(1), SETTINGS)
    async with stage.serve() as service:
        app = create_app([api_model(service, idle, settings)])
        async with client(app) as http:
            yield http


async def post(folder: Path, body: dict[str, Any], name: str = "bert", path: str = "/v1/rerank") -> httpx.Response:
    async with served(build_encoder(folder / f"{name}.gguf", name, pooling=RANK)) as http:
        return await http.post(path, json=body)


@pytest.mark.parametrize("name", RERANKERS)
async def test_scores_and_order_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    wanted = recorded()[name]
    reply = (await post(tmp_path, {"query": QUERY, "documents": DOCUMENTS}, name)).json()
    assert reply["usage"] == {"prompt_tokens": wanted["tokens"], "total_tokens": wanted["tokens"]}
    scores = {result["index"]: result["relevance_score"] for result in reply["results"]}
    assert [scores[index] for index in range(len(DOCUMENTS))] == pytest.approx(wanted["scores"], abs=1e-2)
    assert list(scores) == sorted(scores, key=lambda index: -wanted["scores"][index])


async def test_two_forms(tmp_path: Path) -> None:
    async with served(build_encoder(tmp_path / "bert.gguf", "bert", pooling=RANK)) as http:
        documents = [{"text": text} for text in DOCUMENTS]
        ours = {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
        jina = (await http.post("/reranking", json=ours)).json()
        texts = {"query": QUERY, "texts": DOCUMENTS, "top_n": 2, "return_text": True, "raw_scores": True}
        tei = (await http.post("/rerank", json=texts)).json()
    assert (jina["object"], jina["model"]) == ("list", "bert")
    assert [result["document"]["text"] for result in jina["results"]] == [result["text"] for result in tei]
    found = [{"index": result["index"], "score": result["relevance_score"]} for result in jina["results"]]
    assert found == [{"index": result["index"], "score": result["score"]} for result in tei]


@pytest.mark.parametrize(("documents", "units"), [(DOCUMENTS, 1), (DOCUMENTS[:1] * 100, 1), (DOCUMENTS[:1] * 101, 2)])
@pytest.mark.parametrize("top_n", [None, 1])
async def test_cohere_form(documents: list[str], units: int, top_n: int | None, tmp_path: Path) -> None:
    async with served(build_encoder(tmp_path / "bert.gguf", "bert", pooling=RANK)) as http:
        body = {"model": "rerank-v3.5", "query": QUERY, "documents": documents, "top_n": top_n, "priority": 0}
        cohere = (await http.post("/v2/rerank", json=body)).json()
        jina = (await http.post("/v1/rerank", json=body)).json()
    assert cohere.keys() == {"id", "results", "meta"} and isinstance(cohere["id"], str)
    assert cohere["results"] == jina["results"] and len(cohere["results"]) == (top_n or len(documents))
    assert cohere["meta"]["api_version"]["version"] == "2"
    assert cohere["meta"]["billed_units"] == {"search_units": units}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "a", "documents": []}, "1 to 2048 texts"),
        ({"query": "a", "documents": None}, "give either `documents` or `texts`"),
        ({"query": "a", "documents": 123}, "1 to 2048 texts"),
        ({"query": "a", "documents": [1, 2]}, "each item must be a string"),
        ({"query": "a", "documents": ["b"], "texts": ["c"]}, "give either `documents` or `texts`"),
        ({"documents": ["b"]}, "query"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["b", "the " * 300]}, "maximum context length is 256"),
        ({"query": "a", "documents": ["b"], "truncate": True}, "truncate"),
    ],
)
async def test_refused_requests(body: dict[str, Any], message: str, tmp_path: Path) -> None:
    reply = await post(tmp_path, body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


async def test_a_reranker_embeds_nothing_and_others_rank_nothing(tmp_path: Path) -> None:
    reply = await post(tmp_path, {"input": "a"}, path="/v1/embeddings")
    assert reply.status_code == 400
    assert "ranks documents" in reply.json()["error"]["message"]
    async with served(build_encoder(tmp_path / "mean.gguf", "bert")) as http:
        reply = await http.post("/rerank", json={"query": "a", "documents": ["b"]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (501, "not_supported")
    assert "'mean' does not rank documents: serve a reranker, such as `llamaclust up hf:" in reply.text


async def test_the_refusal_names_the_models_that_rank(tmp_path: Path) -> None:
    async with served(build_encoder(tmp_path / "mean.gguf", "bert"), ApiSettings(rankers=("bge", "qwen"))) as http:
        reply = await http.post("/rerank", json={"query": "a", "documents": ["b"]})
    assert reply.json()["error"]["message"] == "/rerank: 'mean' does not rank documents: name 'bge' or 'qwen' as model"


@pytest.mark.parametrize("name", RERANKERS)
def test_a_file_with_a_classifier_that_names_no_pooling_ranks(name: str, tmp_path: Path) -> None:
    named = Model.open(build_encoder(tmp_path / "named.gguf", name, pooling=RANK))
    path = build_encoder(tmp_path / "unnamed.gguf", name, pooling=RANK, without=(f"{name}.pooling_type",))
    model = Model.open(path)
    assert f"{name}.pooling_type" not in model.file.metadata
    assert (model.ranking, model.pooling) == (named.ranking, named.pooling)
    assert model.program(0, model.layer_count, KvType.F16) == named.program(0, named.layer_count, KvType.F16)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
async def test_a_reranker_generates_nothing(name: str, tmp_path: Path) -> None:
    reply = await post(tmp_path, {"prompt": "the man", "max_tokens": 2}, name, "/v1/completions")
    assert reply.status_code == 400
    assert "is an encoder or reranker, which generates nothing" in reply.json()["error"]["message"]


async def test_scores_of_a_template_do_not_depend_on_the_company_of_documents(tmp_path: Path) -> None:
    async with served(build_encoder(tmp_path / "qwen3.gguf", "qwen3", pooling=RANK)) as http:
        body = {"query": QUERY, "texts": DOCUMENTS}
        together = {result["index"]: result["score"] for result in (await http.post("/rerank", json=body)).json()}
        for index, document in enumerate(DOCUMENTS):
            alone = (await http.post("/rerank", json={"query": QUERY, "texts": [document]})).json()
            assert alone[0]["score"] == together[index]


@pytest.mark.parametrize(
    ("name", "keys", "without", "message"),
    [
        ("qwen3", {}, "cls.output.weight", "cls.output.weight"),
        ("bert", {}, "cls.weight", "cls"),
        ("modern-bert", {}, "cls.norm.weight", "cls.norm.weight"),
        ("modern-bert", {"classifier.pooling_type": 1}, "", "a classifier with mean pooling is not supported"),
        ("bert", {"classifier.pooling_type": 1}, "", "a classifier with mean pooling is not supported"),
        ("qwen3", {"tokenizer.chat_template.rerank": "{query}"}, "", "must be a text with {query} and {document}"),
        ("qwen3", {"tokenizer.chat_template.rerank": 7}, "", "must be a text with {query} and {document}"),
    ],
)
def test_rerankers_that_lack_a_part_are_refused(
    name: str, keys: dict[str, WritableValue], without: str, message: str, tmp_path: Path
) -> None:
    path = build_encoder(tmp_path / "bad.gguf", name, pooling=RANK, keys=keys, without=(without,))
    with pytest.raises(ModelFileError, match=re.escape(message)):
        assert Model.open(path).ranking is not None


def test_files_that_cannot_rank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cls"):
        Model.open(build_encoder(tmp_path / "nomic.gguf", "nomic-bert", pooling=RANK))
    with pytest.raises(ModelFileError, match="only for encoders and qwen3"):
        Model.open(build_tiny_model(tmp_path / "llama.gguf", extra={"llama.pooling_type": RANK}))


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_two_workers_give_the_scores_of_one(name: str, tmp_path: Path) -> None:
    model = build_encoder(tmp_path / f"{name}.gguf", name, pooling=RANK)
    replies = []
    with command_line() as line:
        for names, bounds in (("a", [[0, 3]]), ("ab", [[0, 2], [2, 3]])):
            plan = [{"worker": name, "layers": layers} for name, layers in zip(names, bounds, strict=True)]
            with line.cluster(model, workers=named(*names), plan=plan, context_length=256) as cluster:
                replies.append(cluster.http.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json())
    assert replies[0]["results"] == replies[1]["results"]
    assert len(replies[0]["results"]) == len(DOCUMENTS)
