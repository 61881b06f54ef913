"""Tests of fields that constrain an answer by a grammar: their forms, refusals, and answers of a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from httpx import Response
from jsonschema import Draft202012Validator

from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.dialects.openai.schema import CompletionBody
from llamaclust.cluster.front.structured_output import GrammarFields
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.checker import GrammarChecker
from support.clusters.served import client
from support.models.tiny_model import build_tiny_model
from support.several_models.api_models import api_model

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "long text"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON = definitions.of_schema(SCHEMA, "")
GBNF = 'root ::= "yes" | "no"'


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"grammar": "", "guided_regex": "", "guided_json": "", "structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, definitions.of_object("")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            JSON,
        ),
        ({"json_schema": SCHEMA}, JSON),
        ({"json_schema": {}}, definitions.of_schema({}, "")),
        ({"guided_json": {}}, definitions.of_schema({}, "")),
        ({"guided_json": json.dumps(SCHEMA)}, JSON),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, JSON),
        ({"structured_outputs": {"json_object": True}}, definitions.of_object("")),
        ({"grammar": GBNF}, definitions.of_gbnf(GBNF, "")),
        ({"guided_grammar": GBNF}, definitions.of_gbnf(GBNF, "")),
        ({"guided_regex": "a+"}, definitions.of_regex("a+", "")),
        ({"guided_choice": ["a", "b"]}, definitions.of_choice(["a", "b"], "")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, definitions.of_choice(["a", "b"], "")),
        ({"regex": "a+"}, definitions.of_regex("a+", "")),
        ({"ebnf": GBNF}, definitions.of_gbnf(GBNF, "")),
        ({"json_schema": json.dumps(SCHEMA)}, JSON),
        ({"guided_json_object": True}, definitions.of_object("")),
        ({"guided_grammar": GBNF, "structured_outputs": {"grammar": GBNF}}, definitions.of_gbnf(GBNF, "")),
        ({"guided_json": {**SCHEMA, "title": "S"}, "structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON),
        (
            {"regex": "a|b", "guided_regex": "a|b", "structured_outputs": {"regex": "a|b"}},
            definitions.of_regex("a|b", ""),
        ),
        ({"response_format": {"type": "json_object"}, "guided_json_object": True}, definitions.of_object("")),
    ],
)
def test_every_form_is_one_grammar(fields: dict[str, Any], grammar: Grammar | None) -> None:
    assert GrammarFields.model_validate(fields).answer_grammar() == grammar


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"response_format": {"type": "xml"}},
            "response_format.type: must be 'text', 'json_object' or 'json_schema', not 'xml'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": 5}},
            "response_format.json_schema: must be an object",
        ),
        ({"response_format": {"type": "json_object", "schema": 3}}, "response_format: a JSON schema must be an object"),
        ({"guided_json": "{"}, "guided_json: is not JSON"),
        ({"guided_choice": []}, "guided_choice: expected a list of one or more non-empty texts"),
        ({"guided_choice": {}}, "guided_choice: must be a list of texts"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: expected a list of one or more"),
        ({"guided_choice": [""]}, "guided_choice: expected a list of one or more non-empty texts"),
        ({"guided_choice": "ab"}, "guided_choice: must be a list of texts"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs: must have exactly one of"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs: must have exactly one of"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": "b"}},
            "structured_outputs.whitespace_pattern: this server does not support this field",
        ),
        ({"grammar": "a" * (1 << 18)}, "grammar: the grammar has 262144 characters"),
        ({"grammar": GBNF, "guided_regex": "a"}, "guided_regex: cannot be used together with grammar"),
    ],
)
def test_other_forms_are_refused(fields: dict[str, Any], reason: str | None) -> None:
    body = GrammarFields.model_validate(fields)
    if reason is None:
        assert body.answer_grammar() is None
        return
    with pytest.raises(ParameterError) as refused:
        body.answer_grammar()
    assert str(refused.value).startswith(reason)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=2)


async def post(model: Path, path: str, fields: dict[str, Any], context_length: int = 256) -> Response:
    stage = LocalStage(model, 1, None, LocalSettings(context_length=context_length))
    async with stage.serve() as service:
        app = create_app([api_model(service, service._engine)])
        async with client(app) as http:
            return await http.post(path, json=fields)


CHAT = {"messages": [{"role": "user", "content": "say"}], "temperature": 0, "max_tokens": 200}


@pytest.mark.parametrize("logprobs", [False, True])
async def test_a_chat_answers_what_its_schema_allows(model: Path, logprobs: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    reply = await post(model, "/v1/chat/completions", {**CHAT, "response_format": wanted, "logprobs": logprobs})
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    Draft202012Validator(SCHEMA).validate(json.loads(choice["message"]["content"]))
    if logprobs:
        assert all(row["logprob"] < 0 for row in choice["logprobs"]["content"]), "of the model, none is forced to 0"


async def test_completions_and_llamacpps_endpoint_obey_grammars(model: Path) -> None:
    fields = {"prompt": "say", "temperature": 0, "grammar": GBNF, "max_tokens": 20}
    text = (await post(model, "/v1/completions", fields)).json()["choices"][0]["text"]
    assert text in ("yes", "no")
    native = {"prompt": "say", "temperature": 0, "json_schema": SCHEMA, "n_predict": 100}
    Draft202012Validator(SCHEMA).validate(json.loads((await post(model, "/completion", native)).json()["content"]))


async def test_an_answer_may_end_where_its_grammar_does_whatever_min_tokens_says(model: Path) -> None:
    fields = {"prompt": "say", "guided_choice": ["yes"], "max_tokens": 20, "min_tokens": 10}
    choice = (await post(model, "/v1/completions", fields)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("yes", "stop")


async def test_a_grammar_that_cannot_be_obeyed_is_400_with_the_reason(model: Path) -> None:
    reply = await post(model, "/v1/chat/completions", {**CHAT, "json_schema": {"type": "string", "pattern": "(?=a)"}})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "json_schema")
    assert "a grammar cannot express pattern" in error["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
async def test_a_required_call_obeys_the_schema_of_its_tool(model: Path, choice: Any) -> None:
    """Checks that the schema constrains each of n answers, with separate grammars, from the first token."""
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "run")]
    fields = {**CHAT, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "n": 2, "max_tokens": 200}
    reply = await post(model, "/v1/chat/completions", fields | {"temperature": 1, "seed": 4}, context_length=2000)
    assert reply.status_code == 200, reply.text
    for answer in reply.json()["choices"]:
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] in (("look", "run") if choice == "required" else ("look",))
        Draft202012Validator(SCHEMA).validate(json.loads(call["function"]["arguments"]))


@pytest.mark.parametrize(
    "form",
    [
        {"json_schema": {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}},
        {"guided_regex": "[0-9]{3}"},
        {"grammar": 'root ::= "none" | "some"'},
    ],
)
async def test_a_required_call_binds_in_place_of_the_answers_form(model: Path, form: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
    fields = {**CHAT, **form, "tools": tools, "tool_choice": "required", "max_tokens": 200}
    reply = await post(model, "/v1/chat/completions", fields, context_length=2000)
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    Draft202012Validator(SCHEMA).validate(json.loads(call["function"]["arguments"]))


_ODD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a"}}}
_DIALECTS = {
    "/v1/chat/completions": {
        **CHAT,
        "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "odd", "parameters": _ODD}}],
    },
    "/v1/responses": {
        "input": "say",
        "temperature": 0,
        "tool_choice": "required",
        "max_output_tokens": 100,
        "tools": [{"type": "function", "name": "odd", "parameters": _ODD}],
    },
    "/v1/messages": {
        "messages": CHAT["messages"],
        "temperature": 0,
        "max_tokens": 100,
        "tool_choice": {"type": "any"},
        "tools": [{"name": "odd", "input_schema": _ODD}],
    },
    "/api/chat": {
        "model": "m",
        "messages": CHAT["messages"],
        "options": {"num_predict": 9},
        "tools": [{"type": "function", "function": {"name": "odd", "parameters": _ODD}}],
    },
}


@pytest.mark.parametrize("path", _DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_whose_schema_cannot_be_obeyed_is_named_by_the_reply(model: Path, path: str, stream: bool) -> None:
    reply = await post(model, path, {**_DIALECTS[path], "stream": stream}, context_length=2000)
    assert (reply.status_code, reply.headers[HEADER]) == (200, "tools.odd"), reply.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a", "grammar": 'root ::= "a"'}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "guided_choice": ["a"]}),
    ],
)
async def test_checks_take_turns_by_key_or_address(
    model: Path, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    owners, check = list[str](), GrammarChecker.check

    async def checked(checker: GrammarChecker, grammar: Grammar, owner: str = "") -> Grammar:
        owners.append(owner)
        return await check(checker, grammar, owner)

    monkeypatch.setattr(GrammarChecker, "check", checked)
    assert (await post(model, path, fields | {"max_tokens": 4})).status_code == 200
    assert owners == ["127.0.0.1"]


def test_all_prompts_of_a_body_share_one_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def of_gbnf(text: str, origin: str) -> Grammar:
        made.append(text)
        return Grammar(text, origin=origin)

    monkeypatch.setattr(definitions, "of_gbnf", of_gbnf)
    requests = CompletionBody.model_validate({"prompt": ["a", "b", "c"], "grammar": GBNF}).requests()
    assert [request.prompt for request in requests] == ["a", "b", "c"]
    assert made == [GBNF] and {request.grammar for request in requests} == {Grammar(GBNF, origin="grammar")}
