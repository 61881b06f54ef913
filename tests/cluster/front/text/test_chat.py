"""Tests of chats before their answers: formats of templates, grammars of calls, continued messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from llamaclust.cluster.front.text import service as service_module
from llamaclust.cluster.front.text.chat import PLAIN, ChatFormat
from llamaclust.cluster.front.text.request import MAX_BEGUN_CHARACTERS, AnswerParsing, ChatRequest, CompletionRequest
from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.model.chat.template import ChatTemplate, TemplateLimits
from support.clusters.served import ScriptedEngine, make_service, says, tokenizer
from support.hanging_children import children_hang

GENERATION = CompletionRequest("Hello", seed=7)


async def test_a_format_that_the_machine_held_up_is_derived_again() -> None:
    source = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    with ChatTemplate(source, "", "", TemplateLimits(start_s=0.05)) as template:
        chat_format = ChatFormat(template, tokenizer())
        with children_hang(), pytest.raises(DeadlineError):
            await chat_format.get()
        for renderer in template._renderers:
            renderer.child._program = replace(renderer.child._program, start_s=60.0)
        assert (await chat_format.get()).takes_tools


async def test_a_message_that_too_many_answers_continue_is_refused_before_it_is_read() -> None:
    reading = AnswerParsing(PLAIN, begun="a" * 10_000)
    with pytest.raises(ParameterError, match="n: 128 answers would read 1280000 characters"):
        await make_service(ScriptedEngine(says("a"))).start(replace(GENERATION, n=128, reading=reading))


async def test_a_long_continued_message_is_refused_before_its_tags_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(service_module, "answer_reasoning", lambda reading, *_: read.append(reading.begun))
    service = make_service(ScriptedEngine(says("a")))

    async def continued(self: ChatFormat, chat: ChatRequest, check: object) -> CompletionRequest:
        return replace(chat.answer, prompt=(1,), reading=AnswerParsing(PLAIN, begun=str(chat.messages[0]["content"])))

    monkeypatch.setattr(ChatFormat, "completion", continued)
    text = "a" * (MAX_BEGUN_CHARACTERS + 1)
    with pytest.raises(ParameterError, match=f"messages: 1 answers would read {len(text)} characters"):
        await service.chat(ChatRequest(({"role": "assistant", "content": text},)))
    assert not read
    await service.chat(ChatRequest(({"role": "assistant", "content": text[1:]},)))
    assert read == [text[1:]]


async def test_a_chat_whose_tokens_are_counted_is_one_active_request(monkeypatch: pytest.MonkeyPatch) -> None:
    service, active, complete = make_service(ScriptedEngine(says("a"))), list[int](), ChatFormat.completion

    async def seeing(self: ChatFormat, chat: ChatRequest, check: Callable[[int], None]) -> CompletionRequest:
        active.append(service.active_requests)
        return await complete(self, chat, check)

    monkeypatch.setattr(ChatFormat, "completion", seeing)
    assert await service.count(ChatRequest(({"role": "user", "content": "Hello"},))) > 0
    assert active == [1] and service.active_requests == 0
