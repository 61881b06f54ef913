"""Recorded requests of coding agents. Texts of the agents are replaced by filler of as many tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from support.paths import DATA

FOLDER: Final = DATA / "agents"
FILLER: Final = re.compile(r"\{(\d+) words\}")


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    """Empty if the request has none."""

    @property
    def offers_tools(self) -> bool:
        return bool(self.body.get("tools"))


@cache
def recorded(agent: str) -> tuple[RecordedRequest, ...]:
    """Returns an agent's requests in order. Each tool is in the file once."""
    record = json.loads((FOLDER / f"{agent}.json").read_text())
    tools = record["tools"]
    for request in record["requests"]:
        if "tools" in request["body"]:
            request["body"]["tools"] = [tools[name] for name in request["body"]["tools"]]
    return tuple(RecordedRequest(**filled(request)) for request in record["requests"])


def filled(value: Any) -> Any:
    """Replaces each `{N words}` by N words, which most vocabularies have as one token each."""
    if isinstance(value, dict):
        return {key: filled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item) for item in value]
    return FILLER.sub(lambda found: " word" * int(found[1]), value) if isinstance(value, str) else value
