"""Adapts messages to a chat template. Message parts that the template cannot render become text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

from llamaclust.model.chat.tools.tool_format import ToolFormat
from llamaclust.model.chat.tools.written_calls import written_calls

Message = Mapping[str, Any]

_INSTRUCTIONS: Final = (
    "You may call functions to answer. These are their definitions, as JSON schemas, within <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\n"
    "For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": "function name", "arguments": {{"name": "value"}}}}\n</tool_call>\n'
    "Results come within <tool_response></tool_response>. Answer without a call where none is needed."
)


def template_messages(form: ToolFormat, messages: Sequence[Message], tools: Sequence[Message]) -> list[dict[str, Any]]:
    if form.call_id_length:
        messages = _with_ids(messages, form.call_id_length)
    adapted: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[str(call.get("id", ""))] = call["function"]["name"]
        if message.get("role") == "tool":
            _add_result(form, adapted, message, names)
        elif message.get("tool_calls"):
            adapted.append(_call_message(form, message))
        else:
            adapted.append(dict(message))
    return adapted if form.takes_tools or not tools else _instructed(form, adapted, tools)


def _with_ids(messages: Sequence[Message], length: int) -> list[Message]:
    """Sets ids of `length` characters in tool calls and their results."""
    made: list[Message] = []
    waiting: list[tuple[str, str]] = []  # Ids and names of calls without results.
    calls = 0
    for message in messages:
        if given := message.get("tool_calls"):
            ids = [_id_of(call.get("id") or f"call {calls + place}", length) for place, call in enumerate(given)]
            calls += len(ids)
            waiting += [(call_id, call["function"]["name"]) for call_id, call in zip(ids, given, strict=True)]
            shown = [{**call, "id": call_id} for call_id, call in zip(ids, given, strict=True)]
            made.append({**message, "tool_calls": shown})
        elif message.get("role") == "tool":
            call_id = _result_id(message, waiting, length)
            waiting = [entry for entry in waiting if entry[0] != call_id]
            made.append({**message, "tool_call_id": call_id})
        else:
            made.append(message)
    return made


def _result_id(message: Message, waiting: Sequence[tuple[str, str]], length: int) -> str:
    if given := message.get("tool_call_id"):
        return _id_of(given, length)
    named = [call_id for call_id, name in waiting if name == message.get("name")]
    return next(iter((*named, *(call_id for call_id, _ in waiting))), _id_of("", length))


def _id_of(given: str, length: int) -> str:
    is_usual = re.fullmatch(rf"[a-zA-Z0-9]{{{length}}}", given) is not None
    return given if is_usual else sha256(given.encode("utf-8", "replace")).hexdigest()[:length]


def _call_message(form: ToolFormat, message: Message) -> dict[str, Any]:
    calls = [call["function"] for call in message["tool_calls"]]
    if not form.takes_call_messages:
        shown = [
            {"id": call.get("id", ""), "function": {"name": function["name"], "arguments": _arguments(function)}}
            for call, function in zip(message["tool_calls"], calls, strict=True)
        ]
        content = "\n".join(filter(None, [message.get("content"), written_calls(form.calls, shown)]))
        return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
    shaped = [
        {**call, "function": {**function, "arguments": _shaped(form, function)}}
        for call, function in zip(message["tool_calls"], calls, strict=True)
    ]
    return {**message, "content": message.get("content") or "", "tool_calls": shaped}


def _shaped(form: ToolFormat, function: Message) -> Any:
    arguments = _arguments(function)
    return _dumped(arguments) if form.takes_text_arguments else arguments


def _arguments(function: Message) -> Any:
    """Returns arguments as an object even if they are JSON text, because some templates iterate over the keys."""
    given = function.get("arguments") or {}
    if not isinstance(given, str):
        return given
    try:
        parsed = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return parsed if isinstance(parsed, dict) else given


def _add_result(form: ToolFormat, adapted: list[dict[str, Any]], message: Message, names: Mapping[str, str]) -> None:
    """Appends a tool's result. For a template without a tool role, joins adjacent results into one user message."""
    name = message.get("name") or names.get(str(message.get("tool_call_id", "")))
    named = {} if name is None else {"name": name}
    if form.takes_tool_role:
        adapted.append({**message, **named})
        return
    text = f"<tool_response>\n{_dumped({**named, 'content': message.get('content', '')})}\n</tool_response>"
    if adapted and adapted[-1]["role"] == "user":
        adapted[-1]["content"] = f"{adapted[-1]['content']}\n{text}"
    else:
        adapted.append({"role": "user", "content": text})


def _instructed(form: ToolFormat, messages: list[dict[str, Any]], tools: Sequence[Message]) -> list[dict[str, Any]]:
    definitions = "\n".join(_dumped(tool.get("function", tool)) for tool in tools)
    text = _INSTRUCTIONS.format(tools=definitions)
    if messages and (messages[0]["role"] == "system" or not form.takes_system_role):
        first, *others = messages
        return [{**first, "content": "\n\n".join(filter(None, [first["content"], text]))}, *others]
    return [{"role": "system" if form.takes_system_role else "user", "content": text}, *messages]


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
