"""Tests of integers larger than any float, in all fields of all APIs and in calls of the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.validation import validate
from llamaclust.core.bounds import finite
from llamaclust.core.errors import ParameterError, ProtocolError
from llamaclust.core.sampler.params import CHAIN, PARAMS, SamplerChain, SamplingParams
from support.clusters.served import ScriptedEngine, make_app, says

HUGE = (10**400, -(10**400), 10**25)
_PLACE = "the number's place"
_CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/messages": _CHAT,
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/responses/compact": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/embedding": {"content": "a"},
    "/completion": {"prompt": "a", "n_predict": 1},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": _CHAT,
    "/api/generate": {"model": "tiny", "prompt": "a", "stream": False, "options": {"num_predict": 1}},
    "/api/chat": {**_CHAT, "stream": False},
    "/api/embed": {"model": "tiny", "input": "a"},
    "/api/embeddings": {"model": "tiny", "prompt": "a"},
}


@pytest.mark.parametrize("path", _BODIES)
async def test_a_number_that_no_float_holds_is_refused_in_one_line(path: str) -> None:
    """Tries the fields of the API's description, also nested ones. Some accept the number: limits without a bound, and
    fields that are only repeated."""
    app = make_app(ScriptedEngine(says("a")))
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    refused = 0
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as http:
        description = (await http.get("/openapi.json")).json()
        schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        definitions = {**description.get("components", {}).get("schemas", {}), **schema.get("$defs", {})}
        for field, part in schema["properties"].items():
            for shape in {json.dumps(value) for value in _values(part, definitions)}:
                for number in HUGE:
                    value = shape.replace(json.dumps(_PLACE), str(number))
                    body = json.dumps(_BODIES[path] | {field: 0}).replace(f'"{field}": 0', f'"{field}": {value}')
                    reply = await http.post(path, content=body)
                    assert reply.status_code in (200, 400), (field, value, reply.text)
                    if reply.status_code == 400:
                        refused += 1
                        assert "\n" not in reply.text.strip() and len(reply.text) < 1000, reply.text
    assert refused >= len(schema["properties"])


def _values(schema: Any, definitions: dict[str, Any], depth: int = 0) -> Iterator[Any]:
    """Yields values that match the schema's structure, each with a placeholder for one number."""
    yield _PLACE
    if depth > 3 or not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield from _values(definitions[schema["$ref"].rpartition("/")[2]], definitions, depth + 1)
    for alternative in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _values(alternative, definitions, depth + 1)
    if schema.get("type") == "array":
        yield from ([value] for value in _values(schema.get("items"), definitions, depth + 1))
    if schema.get("type") == "object":
        named = {"5": schema.get("additionalProperties"), **schema.get("properties", {})}
        for name, part in named.items():
            yield from ({name: value} for value in _values(part, definitions, depth + 1))


@pytest.mark.parametrize("number", [*HUGE, math.inf, math.nan])
@pytest.mark.parametrize("name", [*PARAMS, *CHAIN, "logit_bias"])
def test_programs_get_the_same_refusal(name: str, number: float) -> None:
    value: Any = ((1, number),) if name == "logit_bias" else number
    chain = SamplerChain(**{name: value}) if name in CHAIN else None
    params = SamplingParams(chain=chain) if chain else SamplingParams(**{name: value})
    request = GenerationRequest("a", (1,), 1, params)
    with pytest.raises(ParameterError, match=f"^{name}: must be a .*number within") as error:
        validate(request, SchedulerSettings("m", vocabulary=10, context_length=10, kv_blocks=1))
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("number", [*HUGE[:2], math.inf, -math.inf, math.nan])
def test_numbers_of_peers_are_floats(number: float) -> None:
    with pytest.raises(ProtocolError, match="must be a finite number"):
        finite("speed", number)
    assert finite("speed", 1e308) == 1e308
