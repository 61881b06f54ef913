"""Tests of clients with and without an API key, against a real server on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from llamaclust import AsyncClient, Client
from llamaclust.cluster.client.http_codec import reply_error
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.core.errors import RequestError
from support.clusters import served
from support.clusters.served import ScriptedEngine, says, serving

CHAT = [{"role": "user", "content": "Hello"}]


def call_with(url: str, key: str | None, call: Callable[[Client], object]) -> object:
    with Client(url, key) as client:
        return call(client)


async def test_api_keys() -> None:
    async with serving(served.make_app(ScriptedEngine(says("Hi")), api_keys=("secret-key",))) as url:
        text = await asyncio.to_thread(call_with, url, "secret-key", lambda client: client.generate("x").text)
        assert text == "Hi"


NEEDED = "this API needs a key: send the header Authorization: Bearer KEY, or X-Api-Key: KEY"
REFUSED: dict[str, Callable[[Client], object]] = {
    "a stream": lambda client: client.generate("x"),
    "a chat": lambda client: client.chat(CHAT),
    "a request": lambda client: client.tokenize("x"),
    "embeddings": lambda client: client.embed(["x"]),
}


@pytest.mark.parametrize(("key", "what"), [(None, NEEDED), ("other-key", "unknown API key")])
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
async def test_a_refused_client_is_told_how_to_give_the_key(
    call: Callable[[Client], object], key: str | None, what: str
) -> None:
    advice = f"{what}; the commands take a key by --api-key-file FILE, the Python client by `api_key=`"
    async with serving(served.make_app(ScriptedEngine(says("Hi")), api_keys=("secret-key",))) as url:
        with pytest.raises(RequestError) as caught:
            await asyncio.to_thread(call_with, url, key, call)
        assert str(caught.value) == advice and caught.value.http_status == 401
        async with AsyncClient(url, key) as client:
            with pytest.raises(RequestError, match="--api-key-file FILE"):
                await client.generate("x")
        with pytest.raises(RequestError, match=f"the cluster: {NEEDED}; the commands take a key by --api-key-file"):
            await asyncio.to_thread(lambda: ClusterApi("the cluster", url, None).requests())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "Invalid API Key", "code": 401}}', "Invalid API Key; the commands"),
        (b'{"error": "Incorrect API key provided."}', "Incorrect API key provided; the commands"),
        (b"<html>sign in", "HTTP 401 from a program other than llamaclust: <html>sign in; the commands"),
    ],
)
def test_other_servers_that_want_a_key(body: bytes, message: str) -> None:
    assert str(reply_error(401, None, body)).startswith(message)
