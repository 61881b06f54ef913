"""Tests of the command `chat`, through a pipe and on a terminal, with a scripted server."""

from __future__ import annotations

import json
import signal
import stat
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

from llamaclust import ChatSession, Client
from llamaclust.cli.chat.chat import Chat, ChatSettings
from llamaclust.cli.chat.entries import Entry
from llamaclust.cli.chat.inserted_files import with_files
from llamaclust.cli.chat.line_history import LineHistory
from llamaclust.cluster.client.base import ChunkStream
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.chat.template import ChatTemplate
from support.clusters import served
from support.clusters.scripted_command import command, scripted, terminal
from support.clusters.served import ScriptedEngine

THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}<assistant>"
)

TIMINGS = Timings(1.0, 2.0, 3.0, 4.0, 5, 0, 6)


def prompts(engine: ScriptedEngine) -> list[str]:
    return [served.tokenizer().decode(generation.prompt) for generation in engine.submitted]


async def test_a_chat_through_a_pipe_remembers_saves_and_loads(tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    turns = f"Hello\n\n /not a command\n/save {saved}\n/clear\nNew\n/load {saved}\nMore\n/help\n/exit\nnever sent\n"
    async with scripted("Hi") as (url, engine):
        ended = await command("chat", "--commands", "--system", "Be brief.", "--endpoint", url, piped=turns.encode())
    sent = prompts(engine)
    assert (ended.code, ended.out) == (0, "Hi\n" * 4)
    assert "saved 5 messages" in ended.err and "loaded 5 messages" in ended.err and "/clear" in ended.err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *("user", "assistant") * 2]
    assert [message["content"] for message in messages] == ["Be brief.", "Hello", "Hi", "/not a command", "Hi"]
    assert all("Be brief." in prompt for prompt in sent)
    assert ["Hello" in prompt for prompt in sent] == [True, True, False, True]
    assert "/not a command" in sent[3] and "New" not in sent[3]


async def test_piped_text_is_sent_as_it_is(tmp_path: Path) -> None:
    """Checks that commands in piped text, which may be untrusted, read and write no files."""
    (tmp_path / "key").write_text("secret")
    new = tmp_path / "new"
    lines = [f"see @{tmp_path}/key", f"/save {new}", "/exit"]
    async with scripted("Hi") as (url, engine):
        ended = await command("chat", "--endpoint", url, piped="\n".join(lines).encode())
    assert (ended.code, ended.out) == (0, "Hi\n" * 3), ended.err
    assert all(line in prompt for line, prompt in zip(lines, prompts(engine), strict=True))
    assert not new.is_file()


def test_what_came_of_an_answer_that_fails_is_saved(tmp_path: Path) -> None:
    def breaks(*_: object, **__: object) -> object:
        session.messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "H"}]
        raise LlamaclustError("the connection broke")

    with Client("http://127.0.0.1:9") as client:
        session, file = ChatSession(client), tmp_path / "chat.json"
        session.send = breaks  # type: ignore[method-assign,assignment]
        with pytest.raises(LlamaclustError, match="broke"):
            Chat(session, ChatSettings(file=file)).take(Entry("Hello"))
    assert len(json.loads(file.read_text())["messages"]) == 2


async def test_a_chat_longer_than_the_context_goes_on_without_its_oldest_turns() -> None:
    turns = [f"turn {number} {'x' * 30}" for number in range(6)]
    async with scripted("Hi") as (url, engine):
        ended = await command("chat", "--system", "Be brief.", "--endpoint", url, piped="\n".join(turns).encode())
    sent = prompts(engine)
    assert (ended.code, ended.out) == (0, "Hi\n" * len(turns))
    assert ended.err.count("its oldest turns are no longer sent") == 1 and "/clear" in ended.err
    assert all("Be brief." in prompt and turn in prompt for prompt, turn in zip(sent, turns, strict=True))
    assert turns[0] not in sent[-1] and turns[-2] in sent[-1]


async def test_a_message_longer_than_the_context_is_refused() -> None:
    async with scripted("Hi") as (url, _):
        ended = await command("chat", "--endpoint", url, piped=b"Hello\n" + b"x" * 300)
    assert ended.code == 2 and "context length" in ended.err and ended.out == "Hi\n"


async def test_commands_change_and_show_the_conversation() -> None:
    lines = "/system Be loud.\nHello\n/again\n/system\nMore\n/stats\n/undo\n/history\n/?\n/bye\n"
    async with scripted("Hi") as (url, engine):
        ended = await command("chat", "--commands", "--endpoint", url, piped=lines.encode())
    sent = prompts(engine)
    assert (ended.code, ended.out) == (0, "Hi\n" * 3 + "user: Hello\nassistant: Hi\n")
    assert sent[0] == sent[1] and "Be loud." in sent[0] and "Be loud." not in sent[2]
    assert sent[2].count("Hello") == 1
    assert "answer: 3 tokens, 50.0 tok/s" in ended.err and "3 of them cached" in ended.err
    assert "took back 2 messages; 2 are left" in ended.err and "/save FILE" in ended.err


def test_an_answer_that_does_not_come_again_stays() -> None:
    with Client("http://127.0.0.1:9") as client:
        session = ChatSession(client)
        session.messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        with pytest.raises(LlamaclustError, match="does not answer"):
            Chat(session, ChatSettings()).take(Entry("/again"))
    assert [message["content"] for message in session.messages] == ["Hello", "Hi"]


async def test_messages_of_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "two lines"
    file.write_text("1\n2\n")
    lines = f'a \\\nb\n"""c\n@no file\n/exit"""\n"""\n d\n"""\n/history\nsee @"{file}", too\n'
    async with scripted("Hi") as (url, engine):
        ended = await command("chat", "--commands", "--endpoint", url, piped=lines.encode())
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[3:-1] == [
        *("user: a ", "b", "assistant: Hi"),
        *("user: c", "@no file", "/exit", "assistant: Hi"),
        *("user:  d", "assistant: Hi"),
    ]
    assert "see 1\n2, too" in prompts(engine)[-1]


@pytest.mark.parametrize("line", ["a\\", '"""a\nb'])
async def test_input_that_ends_within_a_message_is_not_sent(line: str) -> None:
    async with scripted("Hi") as (url, engine):
        ended = await command("chat", "--endpoint", url, piped=line.encode())
    assert (ended.code, ended.out, engine.submitted) == (2, "", [])
    assert "the input ended within" in ended.err


def test_names_of_files_end_before_punctuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A\n")
    Path("b c").write_text("B")
    assert (
        with_files('Compare @a.txt, @"b c" (or @a.txt)! me@a.txt @ @, end') == "Compare A, B (or A)! me@a.txt @ @, end"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "@file: No such file"),
        (b"a\n\xff", "byte 2 in line 2 is not UTF-8 text"),
        (b"a\0b", "not text"),
        (b"x" * (1 << 20) + b"x", "larger than 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_inserted(
    content: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("file").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        with_files("see @file")
    with pytest.raises(UsageError, match="not a regular file"):
        with_files("see @/dev/zero")


async def test_a_session_file_goes_on_where_the_last_chat_ended(tmp_path: Path) -> None:
    system, file = tmp_path / "system.txt", tmp_path / "chat.json"
    system.write_text("Be brief.\n")
    async with scripted("Hi") as (url, engine):
        common = ("chat", "--session", str(file), "--endpoint", url)
        assert (await command(*common, "-f", str(system), piped=b"One\n")).code == 0
        assert (await command(*common, piped=b"Two\n")).code == 0
        ended = await command(*common, "--system", "a", "--system-file", str(system))
        assert ended.code == 2 and "give one of them" in ended.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    contents = [message["content"] for message in json.loads(file.read_text())["messages"]]
    assert contents == ["Be brief.", "One", "Hi", "Two", "Hi"]
    assert "One" in prompts(engine)[1]


async def test_reverse_prompts_and_stats() -> None:
    async with scripted("Hi\nUser: no") as (url, _):
        arguments = ("-r", "xyz", "--reverse-prompt", "\nUser:", "--stats")
        ended = await command("chat", *arguments, "--endpoint", url, piped=b"Hello\nMore\n")
    assert (ended.code, ended.out) == (0, "Hi\n" * 2)
    assert ended.err.count("tok/s") == 2 * 2


async def test_stats_have_drafted_tokens() -> None:
    async with scripted("Hi") as (url, _):
        ended = await command("chat", "--stats", "--endpoint", url, piped=b"Hello\n")
    assert ended.err.endswith(" tok/s, 4 of 6 drafted tokens accepted\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/again", "no user message"),
        ("/undo", "no user message"),
        ("/stats", "there are no statistics to show"),
        ("/sing", "unknown command /sing"),
        ("/save", "needs the name of a file"),
        ("/save /nonexistent/a/b", "cannot save"),
        ("/save /dev/null", "not a file"),
        ("/save FILE", "exists and is not a conversation"),
        ("/load /nonexistent", "cannot load"),
        ("/load FILE", "not a saved conversation"),
        ("see @/nonexistent", "@/nonexistent: No such file"),
    ],
)
async def test_mistakes_in_a_piped_chat_end_it(line: str, words: str, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"messages": [{"role": "judge", "content": "x"}]}')
    async with scripted("Hi") as (url, engine):
        piped = f"{line.replace('FILE', str(other))}\nHello\n".encode()
        ended = await command("chat", "--commands", "--endpoint", url, piped=piped)
    assert (ended.code, ended.out, engine.submitted) == (2, "", [])
    assert words in ended.err and ended.err.count("\n") == 1


# -- on a terminal -----------------------------------------------------------------------------------------------------


async def test_a_chat_on_a_terminal_knows_the_lines_of_the_last_one(tmp_path: Path) -> None:
    async with scripted("Hi") as (url, engine):
        for line in ("Hello\n", "\x1b[A\n"):  # the second is the key "up"
            async with terminal("chat", "--endpoint", url, state_dir=tmp_path) as screen:
                await screen.shows("> ")
                screen.type(line)
                await screen.shows("> ", after="Hi\r\n")  # earlier, Ctrl-D would not end the input
                screen.type("\x04")
                assert await screen.ends() == 0
        first, again = (generation.prompt for generation in engine.submitted)
    assert first == again
    assert stat.S_IMODE((tmp_path / ".chat_history").stat().st_mode) == 0o600


def test_the_history_of_lines_is_bounded(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    path = tmp_path / "state" / "history"
    try:
        history = LineHistory(path)
        for line in (*map(str, range(1005)), " ", "x" * 5000, "\udcff"):
            history.add(line)
        assert path.read_text().split("\n") == [*map(str, range(1005)), ""]
        readline.clear_history()
        LineHistory(path)
        assert readline.get_current_history_length() == 1000
        assert path.read_text().split("\n") == [*map(str, range(5, 1005)), ""]
        path.unlink()
        path.symlink_to("/dev/full")
        LineHistory(path).add("one more")
    finally:
        readline.clear_history()
        readline.set_auto_history(True)


async def test_control_c_interrupts_an_answer_and_not_the_chat(tmp_path: Path) -> None:
    async with (
        scripted("Hello" * 30) as (url, engine),
        terminal("chat", "--endpoint", url, state_dir=tmp_path) as screen,
    ):
        await screen.shows("> ")
        engine.gate.clear()
        screen.type("One\n")
        await served.until(lambda: engine.running == 1)
        screen.process.send_signal(signal.SIGINT)
        await screen.shows("(interrupted)")
        await served.until(lambda: engine.running == 0)
        screen.process.send_signal(signal.SIGINT)
        await screen.shows("/exit or Ctrl-D leaves")
        engine.gate.set()
        screen.type("Two\n")
        await screen.shows("Hello" * 30)
        screen.type("/nonsense\n")
        await screen.shows("unknown command")
        screen.type("/exit\n")
        assert await screen.ends() == 0
    sent = prompts(engine)
    assert len(sent) == 2 and "Two" in sent[1] and "One" not in sent[1]


async def test_control_c_discards_a_message_that_is_not_complete(tmp_path: Path) -> None:
    async with scripted("Hi") as (url, engine), terminal("chat", "--endpoint", url, state_dir=tmp_path) as screen:
        await screen.shows("> ")
        screen.type('"""One\n')
        await screen.shows(". ")
        screen.process.send_signal(signal.SIGINT)
        await screen.shows("/exit or Ctrl-D leaves")
        screen.type('"""Two\n')
        await screen.shows(". ", times=2)
        screen.type('lines"""\n')
        await screen.shows("Hi\r\n")
        screen.type("/exit\n")
        assert await screen.ends() == 0
    (sent,) = prompts(engine)
    assert "Two\nlines" in sent and "One" not in sent


@pytest.mark.parametrize(
    ("color", "shown"),
    [("on", "\x1b[2mHm.\x1b[0m\r\n\r\nYes.\r\n"), ("auto", "[reasoning]\r\nHm.\r\n[answer]\r\nYes.\r\n")],
)
async def test_reasoning_is_apart_from_the_answer(color: str, shown: str, tmp_path: Path) -> None:
    with ChatTemplate(THINKS, "", "") as template:
        async with (
            scripted("<think>Hm.</think>\n\nYes.", chat_template=template) as (url, engine),
            terminal("chat", "--color", color, "--endpoint", url, state_dir=tmp_path) as screen,
        ):
            await screen.shows("> ")
            screen.type("Hello\n")
            await screen.shows(shown)
            assert ("\x1b[1;32m> \x1b[0m" in screen.seen) == (color == "on")
            screen.type("More\n")
            await screen.shows(shown, times=2)
            await screen.shows("> ", after=shown)
            screen.type("\x04")
            assert await screen.ends() == 0
        assert "<think>Hm.</think>Yes." in prompts(engine)[1]
        async with scripted("<think>Hm.</think>\n\nYes.", chat_template=template) as (url, _):
            ended = await command("chat", "--endpoint", url, piped=b"Hello\n")
        assert (ended.out, ended.err) == ("Yes.\n", "")
        async with scripted("<think>Hm.", chat_template=template) as (url, _):
            ended = await command("chat", "--endpoint", url, piped=b"Hello\n")
    assert (ended.code, ended.out) == (0, "\n")
    assert ended.err.startswith("(no answer: generation ended within the reasoning")


def test_colors_are_off_where_the_user_or_the_terminal_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from llamaclust.cli.chat.answer_screen import uses_color
    from llamaclust.cli.terminal import Color

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for term, no_color, expected in (("xterm", "", True), ("xterm", "1", False), ("dumb", "", False)):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        assert uses_color(Color.AUTO) == expected
        assert uses_color(Color.ON) and not uses_color(Color.OFF)
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not uses_color(Color.AUTO)


@pytest.mark.parametrize("command", ["Hello", "/again", " /literal"])
@pytest.mark.parametrize("ends", [KeyboardInterrupt, LlamaclustError("the connection broke")])
def test_stats_are_not_those_of_the_answer_before(
    command: str, ends: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*chunks: TextChunk, ends: BaseException | type[BaseException] | None = None) -> ChunkStream:
        def given() -> Generator[TextChunk, None, None]:
            yield from chunks
            if ends is not None:
                raise ends

        return ChunkStream(given())

    with Client("http://127.0.0.1:9") as client:
        session = ChatSession(client)
        chat = Chat(session, ChatSettings())
        monkeypatch.setattr(session, "send", lambda *_, **__: answer(TextChunk(text="Hi", timings=TIMINGS)))
        chat.take(Entry("First"))
        chat.take(Entry("/stats"))
        for name in ("send", "regenerate"):
            monkeypatch.setattr(session, name, lambda *_, **__: answer(TextChunk(text="H"), ends=ends))
        with suppress(LlamaclustError):
            chat.take(Entry(command.strip(), is_literal=command.startswith(" ")))
        with pytest.raises(UsageError, match="there are no statistics to show"):
            chat.take(Entry("/stats"))


@pytest.mark.parametrize("command", ["/undo", "/clear", "/load FILE"])
def test_stats_are_of_an_answer_in_the_conversation(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Client("http://127.0.0.1:9") as client:
        session = ChatSession(client)
        session.save(tmp_path / "other")
        chat = Chat(session, ChatSettings())
        chunks = ChunkStream(chunk for chunk in [TextChunk(text="Hi", timings=TIMINGS)])
        monkeypatch.setattr(session, "send", lambda *_, **__: chunks)
        monkeypatch.setattr(session, "undo", lambda: [])
        chat.take(Entry("First"))
        chat.take(Entry("/stats"))
        chat.take(Entry(command.replace("FILE", str(tmp_path / "other"))))
        with pytest.raises(UsageError, match="there are no statistics to show"):
            chat.take(Entry("/stats"))
