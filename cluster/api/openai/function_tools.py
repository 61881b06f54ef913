"""Functions that a model may call, as all APIs know them within."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

MAX_TOOLS: Final = 1024
_NAME: Final = re.compile(r"[\w.\-/:]{1,128}")
_ID_CHARACTERS: Final = 24
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}


def function_tool(function: Mapping[str, Any], place: str = "", parameters: str = "parameters") -> dict[str, Any]:
    """OpenAI's definition of a function. `place` and `parameters` name its fields in messages: ValueError for a field
    of another form."""
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise ValueError(f"{place}name: must have 1 to 128 letters, digits and characters of _.-/:")
    if not isinstance(function.get(parameters) or {}, dict):
        raise ValueError(f"{place}{parameters}: must be a JSON schema, an object")
    if not isinstance(function.get("description") or "", str):
        raise ValueError(f"{place}description: must be a string")
    made = {"name": function["name"], "description": function.get("description") or ""}
    return {"type": "function", "function": {**made, "parameters": function.get(parameters) or _NO_PARAMETERS}}


def call_id_of(choice_id: str, index: int, prefix: str = "call_") -> str:
    """Of a call that the model gave none: the same where a reply is computed again."""
    return f"{prefix}{sha256(f'{choice_id} {index}'.encode()).hexdigest()[:_ID_CHARACTERS]}"
