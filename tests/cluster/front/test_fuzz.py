"""Checks that random bodies get an answer or a client error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.front.dialects.anthropic.schema import MessagesBody
from llamaclust.cluster.front.dialects.llamacpp.completions import LlamaCppBody
from llamaclust.cluster.front.dialects.llamacpp.endpoints import DetokenizeBody, TemplateBody, TokenizeBody
from llamaclust.cluster.front.dialects.ollama.schema import GenerateBody, OllamaChatBody, Options, ShowBody
from llamaclust.cluster.front.dialects.openai.response_schema import ResponsesBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.schema import Body
from support.clusters.served import MODEL, VOCABULARY, client, make_app, real_engine

BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": MessagesBody,
    "/v1/responses/input_tokens": ResponsesBody,
    "/completion": LlamaCppBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/apply-template": TemplateBody,
    "/api/generate": GenerateBody,
    "/api/chat": OllamaChatBody,
    "/api/show": ShowBody,
}

numbers = st.integers(-2, 40) | st.integers() | st.floats() | st.just(10**300) | st.just(2**64)
texts = st.text(max_size=20) | st.sampled_from(["user", "system", "<|im_end|>", "text", "a"])
tokens = st.lists(st.integers(-1, VOCABULARY), max_size=20)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts | tokens,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": texts, "content": texts | st.just([{"type": "text", "text": "a"}])}) | anything,
    max_size=3,
)
likely = {
    "prompt": texts | tokens | st.lists(texts | tokens, max_size=3),
    "messages": messages,
    "content": texts,
    "tokens": tokens,
    "stop": texts | st.lists(texts, max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
    "max_tokens": st.integers(0, 30),
    "n_predict": st.integers(-2, 30),
    "stream": st.booleans(),
    "input": texts | messages,
    "system": texts,
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 5),
    "n": st.integers(0, 4),
    "options": st.dictionaries(st.sampled_from([*Options.model_fields, "num_ctx"]), numbers, max_size=3),
    "format": st.sampled_from(["json", "", {"type": "object"}, True]),
}
good_messages = [{"role": "user", "content": "a"}]


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(BODIES)))
    kind = BODIES[path]
    foreign = kind.foreign
    known = (*foreign.refused, *foreign.hints, *foreign.other_names)
    names = st.sampled_from([*kind.model_fields, *known, "unknown"])
    body: dict[str, Any] = {"prompt": "a", "messages": good_messages, "content": "a", "tokens": [5], "input": "a"}
    body["model"] = MODEL
    body = {name: value for name, value in body.items() if name in kind.model_fields}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        body[name] = draw(likely.get(name, anything) | anything)
    return path, body


@contextmanager
def caller() -> Iterator[Callable[[str, bytes], int]]:
    """Yields a function that posts bytes to a model, checks that nothing runs afterwards, and returns the status."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        engine, _ = runner.run(stack.enter_async_context(real_engine()))
        http = runner.run(stack.enter_async_context(client(make_app(engine))))

        async def post(path: str, data: bytes) -> int:
            async with asyncio.timeout(60):
                reply = await http.post(path, content=data)
            if reply.status_code >= 400:
                error = reply.json()["error"]
                if path.startswith("/api/"):
                    assert error and isinstance(error, str)
                else:
                    assert error["message"] and error["type"] == "invalid_request_error"
            assert engine.scheduler.counts.running == engine.scheduler.counts.waiting == 0
            return reply.status_code

        yield lambda path, data: runner.run(post(path, data))
        runner.run(stack.aclose())


def test_random_fields() -> None:
    seen: set[int] = set()
    with caller() as post:

        @settings(max_examples=300, deadline=None)
        @given(requests())
        def check(request: tuple[str, dict[str, Any]]) -> None:
            path, body = request
            status = post(path, json.dumps(body).encode())
            seen.add(status)
            assert status in (200, 400) or (status == 404 and "model" in body)

        check()
    assert seen >= {200, 400}, "the random bodies were all alike"


def test_random_bytes() -> None:
    with caller() as post:

        @settings(max_examples=100, deadline=None)
        @given(
            st.sampled_from(sorted(BODIES)),
            st.binary(max_size=60) | st.text('{}[]":,0123eE-\\u nulltrue', max_size=60).map(str.encode),
        )
        def check(path: str, data: bytes) -> None:
            assert post(path, data) == 400

        check()
