"""Checks that the page of coding agents has the commands, configuration files, APIs and versions of the recordings."""

from __future__ import annotations

import json
import re

from support.chat.agents.agents import AGENTS
from support.chat.agents.recordings import FOLDER, recorded
from support.paths import ROOT

PAGE = (ROOT / "docs/agents.md").read_text()


def client_of(agent: str) -> str:
    name: str = json.loads((FOLDER / f"{agent}.json").read_text())["client"]
    return name


def test_every_recording_is_an_agent() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(AGENTS)


def test_the_table_has_versions_and_apis_of_the_recordings() -> None:
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|", PAGE, re.MULTILINE)
    assert rows == [(client_of(name), agent.path) for name, agent in AGENTS.items()]
    for name, agent in AGENTS.items():
        assert agent.path in {request.path.partition("?")[0] for request in recorded(name)}


def test_commands_are_those_of_the_recordings() -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = re.sub(r" \\\n +", " ", block).splitlines()
    assert lines == [line for agent in AGENTS.values() for line in (f"# {agent.title}", agent.command)]


def test_configuration_files_are_those_of_the_recordings() -> None:
    blocks = re.findall(r"^(`~/[^\n]+):\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    shown = {path: text for paths, text in blocks for path in re.findall(r"`~/(.+?)`", paths)}
    assert shown == {path: text for agent in AGENTS.values() for path, text in agent.files.items()}
