"""Tests the client of `vllm bench serve` (vLLM's source package): 16 and 64 concurrent streams for a minute each."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp  # type: ignore[import-not-found]
import pytest

_SECONDS = 60.0
_TOKENS = 64
_BACKENDS = {"/v1/completions": "openai", "/v1/chat/completions": "openai-chat"}


@pytest.fixture(scope="session")
def client() -> ModuleType:
    """Loads the unchanged file `vllm/benchmarks/lib/endpoint_request_func.py` without the rest of vLLM."""
    path = Path(sys.prefix) / "source" / "endpoint_request_func.py"
    spec = importlib.util.spec_from_file_location("endpoint_request_func", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("streams", [16, 64])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_concurrent_streams(client: ModuleType, api: str, model: str, path: str, streams: int) -> None:
    end = time.monotonic() + _SECONDS
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one_by_one(stream: int) -> list[Any]:
            outputs: list[Any] = []
            while time.monotonic() < end:
                given = {"prompt": f"Tell a story of {stream} foxes and {len(outputs)} hens.", "prompt_len": 12}
                target = {"api_url": api + path, "model": model, "output_len": _TOKENS, "ignore_eos": True}
                body = client.RequestFuncInput(**given, **target)
                outputs.append(await client.ASYNC_REQUEST_FUNCS[_BACKENDS[path]](body, session))
            return outputs

        outputs = [output for made in await asyncio.gather(*map(one_by_one, range(streams))) for output in made]
    assert [output.error for output in outputs if not output.success] == []
    assert {output.output_tokens for output in outputs} == {_TOKENS}
