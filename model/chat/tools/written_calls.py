"""Writes tool calls of earlier answers in a model's notation, for chat templates that render no calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS
from llamaclust.model.chat.tools.tool_format import Calls, NamedCalls, NotatedCalls, Notation, ObjectCalls, TaggedCalls

_CODE_BLOCK: Final = "```"

Call = Mapping[str, Any]
"""A call with `id` and `function`. The function's arguments are an object, or text that is not a JSON object."""


def written_calls(form: Calls | None, calls: Sequence[Call]) -> str:
    """Returns the text of the calls. Notations whose templates always render calls are written like Hermes's."""
    match form:
        case NamedCalls() if not form.name_begin:
            return _framed(form, [_named(form, call, place) for place, call in enumerate(calls)])
        case TaggedCalls() if not form.value_begin:
            return _framed(form, [_tagged(form, call["function"]) for call in calls])
        case NotatedCalls(notation=Notation.PYTHON):
            inner = ", ".join(_python(call["function"]) for call in calls)
            return f"{form.frame.section_begin}[{inner}]{form.frame.section_end}"
        case ObjectCalls(is_list=True):
            listed = f"[{', '.join(_object(form, call) for call in calls)}]"
            return _lines(form.frame.section_begin, listed, form.frame.section_end)
        case ObjectCalls() if form.frame.call_begin:
            begin, end = form.frame.call_begin, form.frame.call_end
            return "\n".join("\n".join(filter(None, (begin, _object(form, call), end))) for call in calls)
        case _:
            return written_calls(GENERIC_CALLS, calls)


def _framed(form: NamedCalls | TaggedCalls, bodies: Sequence[str]) -> str:
    frame = form.frame
    inner = "\n".join(_lines(f"{frame.call_begin}{body}", frame.call_end) for body in bodies)
    return f"{frame.section_begin}{inner}{frame.section_end}"


def _lines(*parts: str) -> str:
    """Joins texts. A code block's marks have lines of their own."""
    text = ""
    for part in filter(None, parts):
        has_break = text.endswith(_CODE_BLOCK) or part.startswith(_CODE_BLOCK) or _CODE_BLOCK in text[-8:]
        text += ("\n" if text and has_break else "") + part
    return text


def _named(form: NamedCalls, call: Call, place: int) -> str:
    name, call_id = call["function"]["name"], str(call.get("id") or "")
    if form.has_name_in_id:
        is_usual = re.fullmatch(rf"functions\.{re.escape(name)}:\d+", call_id)
        name = call_id if is_usual else f"functions.{name}:{place}"
    elif form.id_begin:
        name += f"{form.id_begin}{call_id}"
    return _lines(name, form.name_end, _dumped(call["function"]["arguments"]))


def _object(form: ObjectCalls, call: Call) -> str:
    function = call["function"]
    if form.name_is_key:
        return _dumped({function["name"]: function["arguments"]})
    members = {form.name_key: function["name"], form.arguments_key: function["arguments"]}
    if form.id_key and call.get("id"):
        members[form.id_key] = call["id"]
    return _dumped({form.wrapper_key: members} if form.wrapper_key else members)


def _tagged(form: TaggedCalls, function: Mapping[str, Any]) -> str:
    arguments = function["arguments"] if isinstance(function["arguments"], Mapping) else {}
    shown = (
        f"{form.argument_begin}{key}{form.key_end}{form.value_indent}{_bare(value)}{form.value_dedent}{form.value_end}\n"
        for key, value in arguments.items()
    )
    return f"{function['name']}{form.name_end}\n{''.join(shown)}"


def _python(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"] if isinstance(function["arguments"], Mapping) else {}
    shown = (f"{key}={_dumped(value) if isinstance(value, str) else repr(value)}" for key, value in arguments.items())
    return f"{function['name']}({', '.join(shown)})"


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _dumped(value)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
