"""Checks that text from files and models cannot control a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cli.progress import ready_text
from llamaclust.cli.terminal import print_error, printable, printable_values
from llamaclust.cluster.state.events import Ready
from support.clusters.scripted_command import command, scripted, terminal
from support.models.tiny_model import build_tiny_model

EVIL = "\x1b]0;PWN\x07\x1b[2J evil\n\rfake line"
SEEN = r"\x1b]0;PWN\x07\x1b[2J evil"
TEMPLATE = "{{ raise_exception('\\x1b]0;PWN\\x07\\x1b[2J evil\\n\\rfake line') }}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (EVIL, SEEN + "  fake line"),
        ("a path, größer ☃.gguf", "a path, größer ☃.gguf"),
        ("tab\tbell\x9b31m \u202egnp.exe \udcff", "tab\\tbell\\x9b31m \\u202egnp.exe \\udcff"),
        ("two\r\nlines\x85and\u2028more", "two lines and more"),
        ("", ""),
    ],
)
def test_what_does_not_print_is_shown_as_its_escape(text: str, line: str) -> None:
    assert printable(text) == line


def test_an_error_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    for message in (f"/{'x' * 4000}.gguf: no such file", EVIL, ValueError("an error of another kind")):
        print_error(message)
    long, evil, other = capsys.readouterr().err.splitlines()
    assert len(long) < 200 and long.startswith("error: /xxx") and long.endswith("x.gguf: no such file")
    assert evil == f"error: {SEEN}  fake line" and other == "error: an error of another kind"


def test_a_models_name_is_printable() -> None:
    assert "\x1b" not in ready_text(Ready("demo", "http://127.0.0.1:1", EVIL))


async def test_a_template_that_refuses_says_so_in_one_line(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "evil.gguf", layers=1, extra={"tokenizer.chat_template": TEMPLATE})
    ended = await command("chat", "--model", str(model), "--threads", "1", piped=b"hello\n")
    assert (ended.code, ended.out) == (2, "")
    assert "[2J evil" in ended.err and "\x1b" not in ended.err and ended.err.count("\n") == 1
    async with terminal("chat", "--model", str(model), "--threads", "1", state_dir=tmp_path) as screen:
        await screen.shows("> ")
        screen.type("hello\n")
        await screen.shows("fake line")
        assert "[2J evil" in screen.seen and "\x1b]" not in screen.seen


async def test_a_cluster_file_with_escapes_in_a_name(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text('model: "/tmp/\\e]0;PWN\\a.gguf"\nworkers: [{name: a}]\n')
    ended = await command("plan", str(file))
    assert ended.code == 2 and ended.err == "error: /tmp/\\x1b]0;PWN\\x07.gguf: no such file\n"


@pytest.mark.parametrize("name", ["generate", "chat"])
async def test_generated_text_drives_no_terminal(name: str, tmp_path: Path) -> None:
    """Checks that a pipe gets the text unchanged, and a terminal without control characters."""
    text = "a\x1b[2Jb\x07\tc\x9bd\re\nf"
    async with scripted(text) as (url, _):
        prompt = ("hello",) if name == "generate" else ()
        piped = b"" if prompt else b"hello\n"
        assert (await command(name, *prompt, "--endpoint", url, piped=piped)).out == text + "\n"
        async with terminal(name, *prompt, "--endpoint", url, state_dir=tmp_path) as screen:
            if not prompt:
                await screen.shows("> ")
                screen.type("hello\n")
            await screen.shows("a[2Jb\tcde\r\nf")
            assert not {"\x1b", "\x07", "\x9b"} & set(screen.seen)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "LONG"),
        ("plan", "--set", "model=LONG.gguf"),
        ("up", "--set", "model=/tmp/LONG.gguf"),
        ("generate", "x", "--model", "LONG"),
        ("chat", "--model", "/tmp/LONG.gguf"),
        ("bench", "LONG"),
        ("model", "info", "LONG"),
        ("model", "rm", "LONG"),
        ("model", "pull", "https://127.0.0.1:1/LONG.gguf"),
        ("model", "pull", "pypi:LONG==1/x.gguf"),
        ("model", "pull", "pypi:x==1/LONG.gguf"),
        ("model", "pull", "https://127.0.0.1:1/%1b]0;x.gguf"),
        ("logs", "a", "--cluster", "LONG"),
        ("generate", "x", "--endpoint", "http://127.0.0.1:1", "--api-key-file", "LONG"),
    ],
    ids=" ".join,
)
async def test_a_name_that_is_too_long_is_bad_usage(arguments: tuple[str, ...]) -> None:
    ended = await command(*(argument.replace("LONG", "x" * 4000) for argument in arguments))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and len(ended.err) < 500


def test_texts_of_a_foreign_server_control_no_terminal() -> None:
    value = {"na\x1bme": ["re\x1b[2Jady\a", {"x": "a\u202eb\x9b5m"}, 7, None, True]}
    shown = printable_values(value)
    assert shown == {"na\\x1bme": ["re\\x1b[2Jady\\x07", {"x": "a\\u202eb\\x9b5m"}, 7, None, True]}
