"""Tests of `POST /v1/responses/compact`, which replaces long chats by summaries."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER, STRICT_HEADER
from llamaclust.cluster.front.dialects.openai import response_schema as schema
from support.clusters.served import MODEL, ScriptedEngine, says, tokenizer
from support.clusters.tool_chats import served

PATH = "/v1/responses/compact"
FORMAT = "llamaclust summary 1:"
CHAT: list[dict[str, Any]] = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]


async def compacted(answer: str = " Sun. ", **fields: Any) -> tuple[httpx.Response, ScriptedEngine]:
    engine = ScriptedEngine(says(answer))
    async with served(engine) as http:
        return await http.post(PATH, json={"model": MODEL, "input": CHAT} | fields), engine


def prompt_of(engine: ScriptedEngine) -> str:
    return tokenizer().decode(engine.submitted[-1].prompt)


async def test_the_model_summarizes_a_chat() -> None:
    reply, engine = await compacted(instructions="Be kind.")
    assert reply.status_code == 200, reply.text
    response = reply.json()
    (item,) = response["output"]
    assert (response["object"], item["type"]) == ("response.compaction", "compaction")
    assert b64decode(item["encrypted_content"].removeprefix(FORMAT)) == b"Sun."
    usage = response["usage"]
    assert usage["input_tokens"] == len(engine.submitted[0].prompt) and usage["output_tokens"] > 0
    prompt = prompt_of(engine)
    assert prompt.startswith("<system>Be kind.<user>A<assistant>B<user>Summarize ")
    assert engine.submitted[0].params.temperature == 0


async def test_the_task_joins_a_last_message_of_the_user() -> None:
    _, engine = await compacted(input="Hi")
    assert prompt_of(engine).startswith("<user>Hi\n\nSummarize ") and prompt_of(engine).count("<user>") == 1


async def test_a_chat_goes_on_from_its_summary() -> None:
    reply, _ = await compacted()
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        items = [*reply.json()["output"], {"role": "user", "content": "C"}]
        answer = await http.post("/v1/responses", json={"input": items, "instructions": "Be kind."})
    assert answer.status_code == 200, answer.text
    assert prompt_of(engine) == "<system>Be kind.\n\nSummary of the conversation so far:\nSun.<user>C<assistant>"


@pytest.mark.parametrize("answer", [" ", "<think>Hm.</think>"])
async def test_an_empty_summary_is_an_error(answer: str) -> None:
    reply, _ = await compacted(answer)
    assert reply.status_code == 422 and "is empty" in reply.text and "encrypted_content" not in reply.text


async def test_a_long_summary_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MAX_SUMMARY_TOKENS", 7)
    reply, _ = await compacted("The sun shines.")
    item = reply.json()["output"][0]
    assert b64decode(item["encrypted_content"].removeprefix(FORMAT)) == b"The sun"


async def test_a_summary_is_written_without_reasoning() -> None:
    _, engine = await compacted()
    reasoning = engine.submitted[0].reasoning
    assert reasoning is not None and reasoning.budget == 0


async def test_a_stored_response_is_summarized() -> None:
    engine = ScriptedEngine(says("B"))
    async with served(engine) as http:
        stored = (await http.post("/v1/responses", json={"input": "A"})).json()
        fields = {"model": MODEL, "previous_response_id": stored["id"]}
        assert (await http.post(PATH, json=fields)).status_code == 200
    assert prompt_of(engine).startswith("<user>A<assistant>B<user>Summarize ")


async def test_an_unknown_field_is_named_as_it_was_sent() -> None:
    body = {"model": MODEL, "input": CHAT, "max_tokens": 5}
    async with served(ScriptedEngine(says("B"))) as http:
        refused = await http.post(PATH, json=body, headers={STRICT_HEADER: "1"})
        taken = await http.post(PATH, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("max_tokens: unknown field")
    assert (taken.status_code, taken.headers[HEADER]) == (200, "max_tokens")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": None}, "model"),
        ({"model": "other"}, "other"),
        ({"input": []}, "input"),
        ({"input": [{"type": "compaction", "encrypted_content": FORMAT}]}, "was not made by this server"),
        ({"input": [{"type": "compaction", "encrypted_content": f"a{FORMAT}U3Vu"}]}, "was not made by this server"),
    ],
)
async def test_refusals(fields: dict[str, Any], reason: str) -> None:
    reply, engine = await compacted(**fields)
    assert reply.status_code in (400, 404) and reason in reply.text and not engine.submitted
