"""Checks that the API's OpenAPI description is valid and complete, and tests its page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from support.clusters.served import ScriptedEngine, client, make_app, says


class NoWorkers:
    async def drain(self, name: str) -> None: ...
    def undrain(self, name: str) -> None: ...
    async def log(self, name: str) -> Any: ...


@pytest.fixture
async def document() -> dict[str, Any]:
    async with client(make_app(ScriptedEngine(says("a")), workers=NoWorkers())) as http:
        document: dict[str, Any] = (await http.get("/openapi.json")).json()
    return document


async def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)
    identifiers = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(identifiers) == len({*identifiers}) > 20


async def test_operations_declare_parameters_fields_and_errors(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert [parameter["name"] for parameter in paths["/v1/models/{model}"]["get"]["parameters"]] == ["model"]
    chat = paths["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "temperature", "top_k"} <= body["properties"].keys() and "$ref" not in json.dumps(body)
    replies = chat["responses"]["200"]["content"]
    assert {"application/json", "text/event-stream"} == replies.keys()
    assert Draft202012Validator(replies["text/event-stream"]["schema"]).is_valid({"data": "[DONE]"})
    assert {"400", "401", "404", "413", "429", "503"} <= chat["responses"].keys()
    assert paths["/metrics"]["get"]["responses"]["200"]["content"].keys() == {"text/plain"}
    assert paths["/health"]["get"]["security"] == [] and {"bearer": []} in document["security"]


@pytest.mark.parametrize("is_strict", [False, True])
async def test_the_document_allows_what_the_server_accepts(is_strict: bool) -> None:
    async with client(make_app(ScriptedEngine(says("a")), is_strict=is_strict)) as http:
        document = (await http.get("/openapi.json")).json()
        validate(document)
        for fields in (
            {"temperature": None},
            {"spelt_wrong": 1},
            {"stream_options": {"spelt_wrong": 1}, "stream": True},
        ):
            body = {"messages": [{"role": "user", "content": "a"}], **fields}
            reply = await http.post("/v1/chat/completions", json=body)
            operation = document["paths"]["/v1/chat/completions"]["post"]
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert Draft202012Validator(schema).is_valid(body) == (reply.status_code == 200), fields


async def test_the_page_lists_every_operation_and_loads_nothing(document: dict[str, Any]) -> None:
    async with client(make_app(ScriptedEngine(says("a")), workers=NoWorkers())) as http:
        page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert all(path in page.text for path in document["paths"])
    assert "<script" not in page.text and "http://" not in page.text and "https://" not in page.text
