"""Tests LlamaIndex with its class for OpenAI-like servers."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    is_capital: bool


@pytest.fixture
def llm(api: str, model: str) -> OpenAILike:
    return OpenAILike(
        model=model,
        api_base=f"{api}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=200,
        max_retries=0,
    )


HELLO = [ChatMessage(role="user", content="Say hello.")]


def test_chat(llm: OpenAILike) -> None:
    assert llm.chat(HELLO).message.content


def test_a_stream_of_chat(llm: OpenAILike) -> None:
    assert [part.delta for part in llm.stream_chat(HELLO)]


def test_complete(llm: OpenAILike) -> None:
    assert llm.complete("Once").text


def test_a_stream_of_complete(llm: OpenAILike) -> None:
    assert [*llm.stream_complete("Once")]


async def test_asynchronous_chat(llm: OpenAILike) -> None:
    assert (await llm.achat(HELLO)).message.content


def test_tools(llm: OpenAILike) -> None:
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return city

    tool = FunctionTool.from_defaults(get_weather)
    reply = llm.chat_with_tools([tool], user_msg="The weather of Rome?", tool_required=True)
    assert llm.get_tool_calls_from_response(reply)[0].tool_name == "get_weather"


def test_structured_answers(llm: OpenAILike) -> None:
    assert isinstance(llm.as_structured_llm(City).complete("Rome").raw, City)
