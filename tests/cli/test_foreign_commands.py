"""Checks that errors for other programs' commands name the equivalent commands of llamaclust."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.cli.foreign_commands import _COMMANDS, WITHOUT_ARGUMENT
from llamaclust.core.errors import UsageError


def told(*words: str) -> str:
    result = CliRunner().invoke(app, [*words], prog_name="llamaclust")
    assert isinstance(result.exception, UsageError), result.output
    return str(result.exception)


def groups(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    yield path, group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from groups(f"{path} {name}", command)


GROUPS = dict(groups("llamaclust", get_command(app)))


def advised(text: str) -> list[tuple[str, str]]:
    """Returns the groups and names of the commands in backticks."""
    found = []
    for command in re.findall(r"`(llamaclust [^`]*)`", text):
        group, words = "llamaclust", command.split()[1:]
        while f"{group} {words[0]}" in GROUPS:
            group, words = f"{group} {words[0]}", words[1:]
        found.append((group, words[0]))
    return found


@pytest.mark.parametrize(("group", "word"), [(group, word) for group, known in _COMMANDS.items() for word in known])
def test_every_advice_names_commands_that_exist(group: str, word: str) -> None:
    assert word not in GROUPS[group].commands, "it would never be said"
    text = told(*group.split()[1:], word, "some-model")
    assert text.startswith(f"there is no command '{word}': use `llamaclust ") and "{" not in text
    for place, name in advised(text):
        assert name in GROUPS[place].commands or name in ("--version", "--help"), text


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("run qwen3-8b hello", "use `llamaclust up qwen3-8b`, then `llamaclust chat`"),
        ("run", "use `llamaclust up MODEL`, then `llamaclust chat`"),
        ("serve --verbose", "use `llamaclust up MODEL`"),
        ("quantize a.gguf b.gguf Q4_K_M", "use `llamaclust model quantize`"),
        ("merge-lora a b", "use `llamaclust model merge-lora`"),
        ("rotate", "use `llamaclust token rotate`"),
        ("model download qwen3-8b", "use `llamaclust model pull qwen3-8b`"),
        ("chat qwen3-8b", "chat does not take qwen3-8b: `llamaclust up qwen3-8b`, then `llamaclust chat`"),
        ("status home", "status does not take home: `llamaclust status --cluster home`"),
        ("down home", "down does not take home: `llamaclust down --cluster home`"),
        ("worker 10.0.0.1", "worker does not take 10.0.0.1: `llamaclust worker --join 10.0.0.1`"),
        ("generate once upon", "generate does not take upon: put a prompt of several words in quotes"),
    ],
)
def test_what_is_said(words: str, advice: str) -> None:
    assert advice in told(*words.split())


def test_arguments_are_quoted_for_a_shell() -> None:
    assert told("pull", "a b; rm -rf $HOME").endswith("`llamaclust model pull 'a b; rm -rf $HOME'`")
    assert told("pull", "x" * 4000).endswith(f"pull {'x' * 100}`")


@pytest.mark.parametrize("words", ["frobnicate", "model frobnicate", "stat", "up a b"])
def test_other_mistakes_are_the_parsers(words: str) -> None:
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2 and not isinstance(result.exception, UsageError)


def test_advice_for_arguments_is_for_commands_that_exist() -> None:
    assert GROUPS["llamaclust"].commands.keys() >= WITHOUT_ARGUMENT.keys()
