"""Tests of chat sessions over HTTP, with asyncio and in this process: history, branches, files, context."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llamaclust import AsyncChatSession, AsyncClient, ChatSession, Client
from llamaclust.cluster.client.local import ServiceClient
from llamaclust.cluster.front.text.answer import join
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import LlamaclustError, RequestError, UsageError, WorkerError
from llamaclust.model.chat.template import ChatTemplate
from support.clusters import served
from support.clusters.served import ScriptedEngine, says, serving

_Value = TypeVar("_Value")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}<assistant>"
)


@asynccontextmanager
async def scripted(*texts: str, **more: Any) -> AsyncIterator[tuple[str, ScriptedEngine]]:
    """Yields a server and its engine, which gives one text after another and then repeats the last one."""
    scripts = [says(text) for text in texts]
    engine = ScriptedEngine(lambda request: (scripts.pop(0) if len(scripts) > 1 else scripts[0])(request), **more)
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with serving(served.make_app(engine, template)) as url:
            yield url, engine
            await served.until(lambda: engine.running == 0)


async def with_session(url: str, use: Callable[[ChatSession], _Value], **options: Any) -> _Value:
    """Uses a synchronous session on another thread."""

    def run() -> _Value:
        with Client(url) as client:
            return use(ChatSession(client, **options))

    return await asyncio.to_thread(run)


def prompts(engine: ScriptedEngine) -> list[str]:
    return [served.tokenizer().decode(generation.prompt) for generation in engine.submitted]


def contents(session: ChatSession | AsyncChatSession) -> list[str]:
    return [message["content"] for message in session.messages]


async def test_answers_are_part_of_what_is_sent_next() -> None:
    def use(session: ChatSession) -> list[str]:
        assert session.send("Hello").text == "Hi."
        assert join(session.send("More", stream=True)).text == "So."
        return contents(session)

    async with scripted("Hi.", "So.") as (url, engine):
        assert await with_session(url, use, system="Be.") == ["Be.", "Hello", "Hi.", "More", "So."]
    assert prompts(engine) == [
        "<system>Be.<user>Hello<assistant>",
        "<system>Be.<user>Hello<assistant>Hi.<user>More<assistant>",
    ]


async def test_options_of_the_session_hold_unless_an_answer_has_its_own() -> None:
    def use(session: ChatSession) -> list[str]:
        session.send("a")
        session.send("b", stop=["."], max_tokens=2)
        session.send("c")
        return contents(session)[1::2]

    async with scripted("Hi. User: x") as (url, engine):
        assert await with_session(url, use, stop="User:", seed=7) == ["Hi. ", "Hi", "Hi. "]
    assert [generation.seed for generation in engine.submitted] == [7, 7, 7]


async def test_an_answer_is_taken_back_computed_anew_and_branched() -> None:
    def use(session: ChatSession) -> tuple[list[str], list[str]]:
        session.send("a")
        assert session.regenerate().text == "2"
        session.send("b")
        branch = session.branch()
        branch.send("c")
        removed = session.undo()
        assert [message["content"] for message in removed] == ["b", "3"]
        return contents(session), contents(branch)

    async with scripted("1", "2", "3", "4") as (url, engine):
        own, branched = await with_session(url, use)
    assert own == ["a", "2"] and branched == ["a", "2", "b", "3", "c", "4"]
    sent = prompts(engine)
    assert sent[0] == sent[1] and sent[3] == "<user>a<assistant>2<user>b<assistant>3<user>c<assistant>"


async def test_without_a_message_there_is_nothing_to_take_back() -> None:
    with Client() as client:
        session = ChatSession(client, "Be.")
        for refused in (session.undo, session.regenerate):
            with pytest.raises(UsageError, match="no user message"):
                refused()
        session.set_system("Be more.")
        session.clear()
        assert contents(session) == ["Be more."]
        session.set_system(None)
        assert session.messages == []


async def test_reasoning_is_kept_apart() -> None:
    def use(session: ChatSession) -> tuple[str, str, dict[str, Any]]:
        answer = session.send("a")
        session.send("b")
        return answer.reasoning, answer.text, session.messages[1]

    async with scripted("<think>Hm.</think>\n\nYes.") as (url, engine):
        reasoning, text, message = await with_session(url, use)
    assert (reasoning, text) == ("Hm.", "Yes.")
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert "<think>Hm.</think>Yes." in prompts(engine)[1]


async def test_a_stream_that_is_closed_leaves_what_came() -> None:
    def use(session: ChatSession) -> list[str]:
        with session.send("a", stream=True):
            pass
        assert session.messages == []
        seen: list[str] = []
        with session.send("a", stream=True) as chunks:
            while len(seen) < 3:
                seen += filter(None, [next(chunks).text])
        assert contents(session) == ["a", "".join(seen)]
        return seen

    async with scripted("abc" * 30) as (url, _):
        assert ("abc" * 30).startswith("".join(await with_session(url, use)))


async def test_an_answer_that_fails_leaves_what_came() -> None:
    def use(session: ChatSession) -> list[str]:
        with pytest.raises(WorkerError, match="worker b"):
            session.send("a")
        return contents(session)

    failure = WorkerError("worker b ended: killed")
    async with scripted("Hello", failure=failure) as (url, _):
        assert await with_session(url, use) == []
    async with scripted("Hello", failure=failure, failure_after=3) as (url, _):
        message, part = await with_session(url, use)
    assert message == "a" and "Hello".startswith(part) and part not in ("", "Hello")


async def test_a_session_answers_one_message_at_a_time() -> None:
    def use(session: ChatSession) -> list[str]:
        with session.send("a", stream=True) as chunks:
            next(chunks)
            with pytest.raises(UsageError, match="still answering"):
                session.send("b")
            for _ in chunks:
                pass
        session.send("c")
        return contents(session)

    async with scripted("Hi") as (url, _):
        assert await with_session(url, use) == ["a", "Hi", "c", "Hi"]


async def test_the_oldest_turns_are_dropped_only_where_that_is_wanted() -> None:
    def use(session: ChatSession) -> int:
        for number in range(6):
            session.send(f"{number}{'x' * 40}")
        return session.dropped_messages

    async with scripted("Hi") as (url, engine):
        assert await with_session(url, use, system="Be.", drop_oldest=True) > 0
        sent = prompts(engine)
        assert all(prompt.startswith("<system>Be.<user>") for prompt in sent)
        assert "0x" in sent[0] and "0x" not in sent[-1] and "5x" in sent[-1]
        with pytest.raises(RequestError, match="context length is 200"):
            await with_session(url, use, system="Be.")
        with pytest.raises(RequestError, match="context length is 200"):
            await with_session(url, lambda session: session.send("x" * 300), drop_oldest=True)


async def test_a_message_without_an_answer_drops_no_turns() -> None:
    def use(session: ChatSession) -> int:
        session.send("a")
        session.send("b")
        with pytest.raises(RequestError, match="context length is 200"):
            session.send("x" * 300)
        session.send("c")
        return session.dropped_messages

    async with scripted("Hi") as (url, engine):
        assert await with_session(url, use, drop_oldest=True) == 0
    assert prompts(engine)[-1] == "<user>a<assistant>Hi<user>b<assistant>Hi<user>c<assistant>"


def test_a_file_keeps_all_messages(tmp_path: Path) -> None:
    file, link = tmp_path / "chat.json", tmp_path / "link"
    link.symlink_to(file)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Bé\u2028."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    with Client() as client:
        session, other = ChatSession(client), ChatSession(client, "Be.")
        session.messages = messages
        session.save(link)
        assert link.is_symlink() and json.loads(file.read_text()) == {"messages": messages}
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and [*tmp_path.glob(".*")] == []
        other.load(str(link))
        assert other.messages == messages
        session.messages = [{"role": "user", "content": {1}}]
        with pytest.raises(UsageError, match="cannot save: a message cannot be written as JSON"):
            session.save(file)
        assert json.loads(file.read_text()) == {"messages": messages}


def test_a_conversation_with_large_images_is_opened_again(tmp_path: Path) -> None:
    with Client() as client:
        session, again = ChatSession(client), ChatSession(client)
        session.messages.append({"role": "user", "content": "x" * (20 << 20)})
        session.save(tmp_path / "chat.json")
        again.load(tmp_path / "chat.json")
    assert again.messages == session.messages


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        "{}",
        '{"messages": 5}',
        '{"messages": [5]}',
        '{"messages": [{"role": "judge", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": ' + "[" * 100_000,
    ],
)
def test_a_file_of_something_else_changes_nothing(content: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(content)
    with Client() as client:
        session = ChatSession(client, "Be.")
        with pytest.raises(UsageError, match="file: not a saved conversation"):
            session.load(file)
        for bad in ("/nonexistent/chat.json", str(tmp_path), "a\0b"):
            with pytest.raises(UsageError):
                session.load(bad)
            with pytest.raises(UsageError):
                session.save(bad)
    assert contents(session) == ["Be."]


async def test_the_async_session_does_the_same() -> None:
    async with scripted("1", "2", "3") as (url, engine), AsyncClient(url) as client:
        session = AsyncChatSession(client, "Be.", stop="x", drop_oldest=True)
        assert (await session.send("a")).text == "1"
        assert "".join([chunk.text async for chunk in session.send("b", stream=True)]) == "2"
        assert (await session.regenerate()).text == "3"
        assert contents(session) == ["Be.", "a", "1", "b", "3"]
        async with session.branch().send("c", stream=True) as chunks:
            await anext(chunks)
        for number in range(5):
            await session.send(f"{number}{'y' * 50}")
        assert session.dropped_messages > 0
    assert prompts(engine)[1] == prompts(engine)[2] == "<system>Be.<user>a<assistant>1<user>b<assistant>"


async def test_a_model_in_this_process() -> None:
    engine = ScriptedEngine(says("<think>Hm.</think>\n\nYes."))

    @asynccontextmanager
    async def service() -> AsyncIterator[TextService]:
        with ChatTemplate(TEMPLATE, "", "") as template:
            yield served.make_service(engine, template)

    def use() -> list[dict[str, Any]]:
        with ServiceClient(service) as client:
            session = ChatSession(client)
            session.send("a")
            join(session.send("b", stream=True))
            return session.messages

    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    messages = await asyncio.to_thread(use)
    assert messages == [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}, answer]


def test_an_unknown_option_is_refused_and_leaves_no_trace() -> None:
    with Client("http://127.0.0.1:9") as client:
        session = ChatSession(client, max_token=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
            session.send("a")
        with pytest.raises(LlamaclustError, match="does not answer"):
            ChatSession(client).send("a")
    assert session.messages == []
