"""Tests of HTTP API clients against a real server on this machine, whose engine has scripted answers."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, get_type_hints

import httpx
import pytest

import llamaclust
from llamaclust import AsyncClient, Client
from llamaclust.cluster.client.base import TextClient
from llamaclust.cluster.client.http import unreachable
from llamaclust.cluster.client.http_codec import AnswerOptions, CompletionOptions, Options
from llamaclust.cluster.client.local import ServiceClient
from llamaclust.cluster.front.text.answer import TextChunk, join
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import LlamaclustError, QueueFullError, RequestError, UsageError, WorkerError
from llamaclust.core.sampler.params import CHAIN, SamplerChain, SamplingParams
from llamaclust.model.chat.template import ChatTemplate
from support.arithmetic.sampled import SAMPLERS
from support.clusters import served
from support.clusters.served import END, ScriptedEngine, ids, logprob, says, serving

_Value = TypeVar("_Value")
CHAT = [{"role": "user", "content": "Hello"}]
_EVERYTHING: AnswerOptions = {
    "max_tokens": 7,
    "temperature": 0.5,
    "seed": 2**63 + 5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.3,
    "penalty_window": 9,
    "logit_bias": {7: 1.5, 3: -2.0},
    "stop": ["x", "yy"],
    "stop_token_ids": [5],
    "min_tokens": 2,
    "speculative": 3,
    **SAMPLERS,
}


async def with_client(url: str, use: Callable[[Client], _Value], **options: Any) -> _Value:
    """Uses a synchronous client on another thread."""

    def run() -> _Value:
        with Client(url, **options) as client:
            return use(client)

    return await asyncio.to_thread(run)


@asynccontextmanager
async def scripted(text: str = "Hello", **more: Any) -> AsyncIterator[tuple[str, ScriptedEngine]]:
    engine = ScriptedEngine(says(text), **more)
    async with serving(served.make_app(engine)) as url:
        yield url, engine
        await served.until(lambda: engine.running == 0)


async def test_a_reply_has_everything_and_the_bits_of_each_logprob() -> None:
    async with scripted("Hello") as (url, _):
        reply = await with_client(url, lambda client: client.generate("abc", max_tokens=9, seed=5))
    tokens = (*ids("Hello"), END)
    assert (reply.text, reply.token_ids, reply.finish_reason, reply.seed) == ("Hello", tokens, "stop", 5)
    assert reply.prompt_token_ids == tuple(ids("abc"))
    assert reply.logprobs == tuple(logprob(place) for place in range(len(tokens)))
    assert (reply.timings.ttft_ms, reply.timings.decode_tok_s) == (20.0, 50.0)
    assert (reply.timings.drafted_tokens, reply.timings.accepted_tokens) == (6, 4)


async def test_without_max_tokens_the_context_is_the_limit() -> None:
    async with scripted("abc" * 200) as (url, _):
        reply = await with_client(url, lambda client: client.generate([1, 2, 3]))
    assert (len(reply.token_ids), reply.finish_reason) == (served.CONTEXT - 3, "length")


async def test_a_stream_brings_the_same_as_a_reply() -> None:
    async with scripted("Hello World") as (url, _):

        def both(client: Client) -> tuple[Any, Any]:
            chunks = list(client.generate("abc", seed=1, stream=True, score_from=1))
            assert len(chunks) > 5
            return join(chunks), client.generate("abc", seed=1, score_from=1)

        streamed, whole = await with_client(url, both)
    assert streamed == whole


async def test_a_closed_stream_ends_its_request() -> None:
    async with scripted("abc" * 50) as (url, engine):

        def some(client: Client) -> list[TextChunk]:
            with client.generate("abc", stream=True) as chunks:
                return [next(chunks), next(chunks)]

        assert len(await with_client(url, some)) == 2
        await served.until(lambda: engine.running == 0)


async def test_a_chat_and_the_tokens_of_its_prompt() -> None:
    async with scripted("Hi") as (url, _):
        reply = await with_client(url, lambda client: client.chat([{"role": "user", "content": "Hello"}]))
    assert (reply.text, reply.token_ids) == ("Hi", (*ids("Hi"), END))
    assert reply.logprobs == tuple(logprob(place) for place in range(len(reply.token_ids)))
    assert "Hello" in served.tokenizer().decode(reply.prompt_token_ids)


async def test_scored_prompt_tokens_start_at_score_from() -> None:
    async with scripted() as (url, engine):
        for start in (0, 1, 2, 4, 6):

            def scored(client: Client, start: int = start) -> tuple[float, ...]:
                return client.generate([9, 8, 7, 6, 5], max_tokens=0, score_from=start).prompt_logprobs

            assert await with_client(url, scored) == tuple(logprob(place) for place in range(max(start, 1), 5))
            assert engine.submitted[-1].score_from == start


async def test_the_async_client_does_the_same() -> None:
    async with scripted("Hello") as (url, _), AsyncClient(url) as client:
        reply = await client.generate("abc", seed=5, score_from=2)
        assert reply == await with_client(url, lambda other: other.generate("abc", seed=5, score_from=2))
        chunks = [chunk async for chunk in client.generate("abc", seed=5, score_from=2, stream=True)]
        assert join(chunks) == reply
        chat = [{"role": "user", "content": "Hello"}]
        assert (await client.chat(chat, seed=1)).text == "Hello"
        assert "".join([chunk.text async for chunk in client.chat(chat, stream=True)]) == "Hello"
        assert await client.detokenize(await client.tokenize("abc", add_special=False)) == "abc"
        async with client.chat(chat, stream=True) as left:
            await anext(left)


async def test_tokens_of_a_text_and_back() -> None:
    async with scripted() as (url, _):
        assert await with_client(url, lambda client: client.tokenize("héllo", add_special=False)) == ids("héllo")
        assert await with_client(url, lambda client: client.detokenize(ids("héllo"))) == "héllo"


async def test_line_separators_that_json_leaves_alone_stay_text() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\nf"
    async with scripted(text) as (url, _):
        assert (await with_client(url, lambda client: client.generate("x"))).text == text


def _request_both_ways(client: TextClient, options: AnswerOptions) -> None:
    client.generate("hi", score_from=0, **options)
    client.chat([{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}], **options)


def _submitted(engine: ScriptedEngine) -> list[GenerationRequest]:
    return [dataclasses.replace(generation, request_id="", group="") for generation in engine.submitted]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ignore_eos": True, "stop_token_ids": []},
        {"max_tokens": None, "min_tokens": 0},
        {"stop": "z"},
        {"mirostat": 2},
    ],
)
async def test_both_kinds_of_client_ask_for_the_same(more: AnswerOptions) -> None:
    """Checks that every option reaches the engine equally over HTTP and in this process."""
    options: AnswerOptions = {**_EVERYTHING, **more}
    async with scripted("a") as (url, engine):
        await with_client(url, lambda client: _request_both_ways(client, options))
    local = ScriptedEngine(says("a"))

    @asynccontextmanager
    async def service() -> AsyncIterator[TextService]:
        yield served.make_service(local)

    with ServiceClient(service) as client:
        await asyncio.to_thread(_request_both_ways, client, options)
    assert _submitted(local) == _submitted(engine)
    assert (local.submitted[0].seed, local.submitted[1].params.top_k) == (2**63 + 5, 3)
    assert [request.max_drafted for request in local.submitted] == [3, 3]
    chain = local.submitted[1].params.chain
    assert chain is not None and (chain.mirostat, chain.dry_base) == (options.get("mirostat", 0), 2.0)
    off = SamplerChain()
    assert all(getattr(chain, name) != getattr(off, name) for name in CHAIN.keys() - {"mirostat"})


def test_every_option_is_tested() -> None:
    exclusive = {"ignore_eos", "mirostat", "response_format", "json_schema", "grammar", "structured_outputs"}
    assert set(_EVERYTHING) | exclusive == set(get_type_hints(AnswerOptions))


async def test_options_that_are_none_have_their_defaults() -> None:
    async with scripted("a") as (url, engine):
        none: Any = dict.fromkeys(get_type_hints(CompletionOptions))
        none_of_chat: Any = dict.fromkeys(get_type_hints(Options))
        await with_client(url, lambda client: (client.generate("x", seed=1), client.chat(CHAT, seed=1)))
        await with_client(url, lambda client: (client.generate("x", **none | {"seed": 1}),))
        await with_client(url, lambda client: (client.chat(CHAT, **none_of_chat | {"seed": 1}),))
    assert _submitted(engine)[:2] == _submitted(engine)[2:]
    assert engine.submitted[0].params == SamplingParams()


async def test_a_chat_has_a_budget_of_reasoning() -> None:
    always = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    engine = ScriptedEngine(says("Hm.</think>Yes."))
    with ChatTemplate(always, "", "") as template:
        async with serving(served.make_app(engine, template)) as url:
            options: Options = {"reasoning_budget": 9, "reasoning_budget_message": "So."}
            reply = await with_client(url, lambda client: client.chat(CHAT, **options))
    (generation,) = engine.submitted
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")
    assert generation.reasoning is not None and generation.reasoning.budget == 9
    assert served.tokenizer().decode_bytes(generation.reasoning.forced).strip() == b"So.</think>"


def test_an_unknown_option_is_refused() -> None:
    with Client() as client, pytest.raises(TypeError, match="unknown option 'max_token'; did you mean 'max_tokens'"):
        client.generate("x", max_token=3)  # type: ignore[call-overload]


# -- errors ------------------------------------------------------------------------------------------------------------


async def test_a_refusal_carries_the_servers_words() -> None:
    async with scripted() as (url, _):
        with pytest.raises(RequestError, match="temperature: must be a number within") as caught:
            await with_client(url, lambda client: client.generate("x", temperature=-1.0))
        assert (caught.value.http_status, caught.value.exit_code) == (400, 2)
        with pytest.raises(RequestError, match="context length is 200") as caught:
            await with_client(url, lambda client: client.generate([1] * 300))
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(RequestError, match="token id"):
            await with_client(url, lambda client: client.detokenize([10_000]))
        async with AsyncClient(url) as client:
            with pytest.raises(RequestError, match="role"):
                await client.chat([{"role": "judge", "content": "x"}])


async def test_what_json_cannot_say_is_refused_before_it_is_sent() -> None:
    async with scripted() as (url, engine):
        with pytest.raises(RequestError, match="cannot be sent"):
            await with_client(url, lambda client: client.generate("x", temperature=float("nan")))
        assert not engine.submitted


async def test_a_full_queue_has_retry_after() -> None:
    async with scripted(refusal=QueueFullError("12 requests wait", retry_after_s=6.5)) as (url, _):
        with pytest.raises(QueueFullError, match="12 requests wait") as caught:
            await with_client(url, lambda client: client.generate("x"))
    assert caught.value.retry_after_s == 7.0


async def test_a_failure_in_the_middle_of_an_answer_is_raised() -> None:
    failure = WorkerError("worker b (layers 3-5) ended: killed")
    async with scripted("Hello", failure=failure, failure_after=3) as (url, _):
        seen: list[str] = []

        def read(client: Client) -> None:
            for chunk in client.generate("x", stream=True):
                seen.append(chunk.text)

        with pytest.raises(WorkerError, match=r"worker b \(layers 3-5\) ended: killed"):
            await with_client(url, read)
    assert 0 < len("".join(seen)) < len("Hello")


async def test_no_server() -> None:
    for host, words in (
        ("127.0.0.1", r"\[Errno 111\] Connection refused"),
        ("localhost", r"\[Errno 111\] Connection refused"),
        ("none.invalid", r"\[Errno -\d\] "),
    ):
        said = rf"http://{host}:9 does not answer \({words}.*\); is the cluster up"
        with pytest.raises(LlamaclustError, match=said):
            await with_client(f"http://{host}:9", lambda client: client.generate("x"))
        async with AsyncClient(f"http://{host}:9") as client:
            with pytest.raises(LlamaclustError, match=said):
                await client.tokenize("x")


def test_a_connection_that_breaks_in_the_middle_of_an_answer() -> None:
    error = unreachable(httpx.URL("http://a:1"), httpx.RemoteProtocolError("peer closed connection"))
    words = "http://a:1 ended the connection in the middle of an answer (peer closed connection); is the cluster up?"
    assert str(error).startswith(words)


async def test_an_awaited_stream_is_the_stream() -> None:
    async with scripted("Hi") as (url, _), AsyncClient(url) as client:
        assert "".join([chunk.text async for chunk in await client.generate("x", stream=True)]) == "Hi"


def test_the_package_lists_its_clients() -> None:
    assert {"Client", "AsyncClient", "__version__"} <= set(dir(llamaclust))


async def _answering(reply: bytes) -> tuple[asyncio.Server, str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")  # the body follows: unread data would reset the connection
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"<html>hello</html>", "before it was complete"),
        (b"data: nonsense\n\n", "not JSON: nonsense"),
        (b"data: [1]\n\n", r"not a JSON object: \[1\]"),
        (b'data: {"choices": [{"text": "a"}]}\n\n', "does not answer as llamaclust does"),
        (b'data: {"choices": 1}\n\n', "does not answer as llamaclust does"),
        (b'data: {"error": "kaput"}\n\n', "kaput"),
    ],
)
async def test_a_server_that_is_something_else(reply: bytes, words: str) -> None:
    server, url = await _answering(reply)
    async with server:
        with pytest.raises(LlamaclustError, match=words):
            await with_client(url, lambda client: client.generate("x"))


async def test_a_server_that_falls_silent() -> None:
    server, url = await _answering(b"data: {")
    server.close()
    silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(30), "127.0.0.1", 0)
    async with silent:
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        with pytest.raises(LlamaclustError, match="timed out"):
            await with_client(url, lambda client: client.generate("x"), timeout=0.2)


async def test_proxies_are_not_used_for_this_machine() -> None:
    async with scripted("Hi") as (url, _):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                patch.setitem(os.environ, name, "http://127.0.0.1:9")
            patch.delenv("NO_PROXY", raising=False)
            patch.delenv("no_proxy", raising=False)
            assert (await with_client(url, lambda client: client.generate("x"))).text == "Hi"
            with pytest.raises(LlamaclustError, match="does not answer"):
                await with_client("http://cluster.invalid", lambda client: client.generate("x"))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8080", "ftp://host", "http://", "http://host:port"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="address"):
        Client(url)


@pytest.mark.parametrize("key", ["", " ", "sch\u00f6n", "a\nb"])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        Client(api_key=key)


async def test_the_address_may_end_as_openais_clients_want_it() -> None:
    async with scripted("Hi") as (url, _):
        assert (await with_client(f"{url}/v1/", lambda client: client.generate("x"))).text == "Hi"


def test_a_stream_keeps_its_client_open() -> None:
    chunks = Client("http://127.0.0.1:1").generate("a", stream=True)
    with pytest.raises(LlamaclustError, match="does not answer"):
        next(chunks)
