"""Derives the format of tool calls from the text that a chat template renders for test calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from llamaclust.model.chat.template_probe import (
    CALL_IDS,
    KEYS,
    NAMES,
    NUMBER,
    VALUES,
    Probe,
    common_begin,
    common_end,
    shared_begin,
    shared_end,
)
from llamaclust.model.chat.tools.tool_format import Calls, Frame, NamedCalls, ObjectCalls, TaggedCalls

_BOTH = dict(zip(KEYS, VALUES, strict=True))
_MAX_CALL_CHARS = 1 << 16
_WORD_AT_END: Final = re.compile(r"\w+$")
_WORD_AT_BEGIN: Final = re.compile(r"^\w+")
_ID_KEYS: Final = ("tool_call_id", "call_id", "id")


def derived_calls(probe: Probe) -> Calls | None:
    text = probe.call_text(_BOTH)
    if NAMES[0] not in text or len(text) > _MAX_CALL_CHARS:
        return None
    return _object_calls(probe, text) or _named_calls(probe, text) or _tagged_calls(probe, text)


def _object_calls(probe: Probe, text: str) -> ObjectCalls | None:
    found = _json_with(text, NAMES[0], 0)
    if found is None:
        return None
    value, begin, end = found
    pair = probe.call_text(_BOTH, _BOTH)
    second = _json_with(pair, NAMES[1], end) if pair else None
    if isinstance(value, list):
        frame, call = Frame(text[:begin].strip(), section_end=text[end:].strip()), value[0]
    else:
        gap = pair[end : second[1]] if second is not None else ""
        frame, call = _frame(text[:begin], gap, text[end:]), value
    if not isinstance(call, Mapping):
        return None
    return _object_form(call, frame, is_list=isinstance(value, list))


def _object_form(call: Mapping[str, Any], frame: Frame, *, is_list: bool) -> ObjectCalls | None:
    wrapper = next((key for key, item in call.items() if isinstance(item, Mapping) and NAMES[0] in item.values()), "")
    inner = call[wrapper] if wrapper else call
    if NAMES[0] in inner:
        return ObjectCalls(frame, is_list=is_list, name_is_key=True)
    keys = {item: key for key, item in inner.items() if isinstance(item, str)}
    arguments = next((key for key, item in inner.items() if KEYS[0] in str(item)), None)
    if NAMES[0] not in keys or arguments is None:
        return None
    id_key = keys.get(CALL_IDS[0]) or next((key for key in _ID_KEYS if isinstance(inner.get(key), str)), "")
    return ObjectCalls(frame, keys[NAMES[0]], arguments, id_key, wrapper, is_list)


def _named_calls(probe: Probe, text: str) -> NamedCalls | None:
    name = text.find(NAMES[0])
    found = _json_with(text, KEYS[0], name)
    if found is None or not isinstance(found[0], Mapping):
        return None
    _, begin, end = found
    pair = probe.call_text(_BOTH, _BOTH)
    second = pair.find(NAMES[1])
    gap = pair[end:second] if second > end else ""
    name_end = text[name + len(NAMES[0]) : begin]
    head, has_first_id, name_begin = text[:name].rpartition(CALL_IDS[0])
    if has_first_id:
        frame = _frame(head, gap.rpartition(CALL_IDS[1])[0], text[end:])
        return NamedCalls(frame, name_end.strip(), name_begin=name_begin.strip())
    frame = _frame(text[:name], gap, text[end:])
    id_begin, has_id, behind_id = name_end.partition(CALL_IDS[0])
    if has_id:
        return NamedCalls(frame, behind_id.strip(), id_begin.strip())
    return NamedCalls(frame, name_end.strip())


def _tagged_calls(probe: Probe, text: str) -> TaggedCalls | None:
    places = [text.find(part) for part in (NAMES[0], KEYS[0], VALUES[0], KEYS[1], VALUES[1])]
    if -1 in places or sorted(places) != places:
        return None
    name, key, value, next_key, next_value = places
    empty = probe.call_text({})
    behind_name = text[name + len(NAMES[0]) : key]
    without = empty[empty.find(NAMES[0]) + len(NAMES[0]) :] if NAMES[0] in empty else ""
    name_end = common_begin(behind_name, without)
    argument_begin = behind_name[len(name_end) :].strip()
    value_end, has_next, _ = text[value + len(VALUES[0]) : next_key].rpartition(argument_begin)
    if not argument_begin or not has_next or not value_end.strip():
        return None
    key_end, attribute, value_begin = _around_key(probe, text[key + len(KEYS[0]) : value])
    value_end = value_end.rstrip()
    tail = text[next_value + len(VALUES[1]) :].removeprefix(value_end)
    return TaggedCalls(
        _tagged_frame(probe, text[:name], tail, value_end),
        name_end.strip(),
        argument_begin,
        key_end.strip(),
        value_end.strip(),
        value_begin.strip(),
        attribute,
        _space_at_end(value_begin or key_end),
        value_end[: len(value_end) - len(value_end.lstrip())],
        has_python_values=f"{{'{KEYS[1]}'" in probe.call_text({KEYS[0]: {KEYS[1]: VALUES[1]}}),
    )


def _tagged_frame(probe: Probe, head: str, tail: str, value_end: str) -> Frame:
    pair = probe.call_text(_BOTH, _BOTH)
    second = pair.find(NAMES[1])
    first_end = pair.find(VALUES[1]) + len(VALUES[1])
    return _frame(head, pair[first_end:second].removeprefix(value_end) if second > first_end else "", tail)


def _around_key(probe: Probe, gap: str) -> tuple[str, str, str]:
    text = probe.call_text({KEYS[0]: NUMBER, KEYS[1]: VALUES[1]})
    key, value = text.find(KEYS[0]), text.find(str(NUMBER))
    other = text[key + len(KEYS[0]) : value] if -1 < key < value else gap
    if other == gap:
        return gap, "", ""
    key_end = _WORD_AT_END.sub("", shared_begin(gap, other))
    value_begin = _WORD_AT_BEGIN.sub("", shared_end(gap[len(key_end) :], other[len(key_end) :]))
    return key_end, gap[len(key_end) : len(gap) - len(value_begin)], value_begin


def _frame(head: str, gap: str, tail: str) -> Frame:
    if not gap:
        return Frame(call_begin=head.strip(), call_end=tail.strip())
    call_begin = common_end(head, gap)
    rest = gap[: len(gap) - len(call_begin)]
    call_end = common_begin(rest, tail)
    return Frame(
        head[: len(head) - len(call_begin)].strip(),
        call_begin.strip(),
        call_end.strip(),
        tail[len(call_end) :].strip(),
    )


def _json_with(text: str, part: str, start: int) -> tuple[Any, int, int] | None:
    decoder = json.JSONDecoder()
    for place in range(start, max(text.find(part, start), start)):
        if text[place] in "{[":
            try:
                value, end = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                continue
            if part in text[place:end]:
                return value, place, end
    return None


def _space_at_end(text: str) -> str:
    return text[len(text.rstrip()) :]
