"""Derives the format of a model's answers from its chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from llamaclust.model.chat.template_probe import (
    CALL_IDS,
    CONTENT,
    KEYS,
    NAMES,
    OTHER_CALL_ID,
    QUESTION,
    REASONING,
    RESULT,
    SYSTEM,
    VALUES,
    Message,
    Probe,
    Render,
    call_message,
    common_begin,
    first_markup,
    last_markup,
)
from llamaclust.model.chat.thoughts import named_thoughts, thought_parts
from llamaclust.model.chat.tools.call_derivation import derived_calls
from llamaclust.model.chat.tools.known_formats import (
    GENERIC_CALLS,
    KNOWN_FORMATS,
    KNOWN_REASONING,
    SHOWN_CALLS,
    KnownFormat,
)
from llamaclust.model.chat.tools.tool_format import Calls, ChannelCalls, ReasoningTags, TaggedCalls, ToolFormat

_ARGUMENTS: Final = {KEYS[0]: VALUES[0]}


def derive_format(source: str, render: Render) -> ToolFormat:
    """Returns the format of a model's answers. Renders the chat template `source` about twenty times with test
    messages, and compares the results."""
    known = next((form for form in KNOWN_FORMATS if all(mark in source for mark in form.marks)), KnownFormat(()))
    plain = Probe(render, _takes_text(Probe(render)))
    reasoning = None if isinstance(known.calls, ChannelCalls) else known.reasoning or _reasoning(source, plain)
    probe = replace(plain, reasoning=reasoning)
    calls = known.calls or derived_calls(probe) or _shown_calls(source) or GENERIC_CALLS
    if isinstance(calls, TaggedCalls) and "CDATA" in source:
        calls = replace(calls, has_cdata=True)
    message, result = _call_and_result(probe, CALL_IDS[0])
    shown = probe.text(message, result)
    return ToolFormat(
        calls,
        reasoning,
        known.dropped or _wrappers(probe),
        known.calls_end_reasoning or isinstance(calls, TaggedCalls),
        takes_tools=probe.text(prompt=True) != probe.text(prompt=True, tools=None),
        takes_text_arguments=probe.text_arguments,
        takes_tool_role=RESULT in shown,
        takes_call_messages=VALUES[0] in probe.text(message),
        takes_system_role=SYSTEM in probe.with_system(SYSTEM),
        takes_thought_parts=_takes_thought_parts(probe),
        takes_text_beside_thoughts=_takes_text_beside_thoughts(probe),
        call_id_length=len(CALL_IDS[0]) if shown and not probe.text(*_call_and_result(probe, OTHER_CALL_ID)) else 0,
    )


def _reasoning(source: str, probe: Probe) -> ReasoningTags | None:
    return _derived_reasoning(probe) or _shown_reasoning(source, probe)


def _takes_thought_parts(probe: Probe) -> bool:
    """Returns True if the template shows thoughts that are parts of the content, but none beside the content."""
    call, result = _call_and_result(probe, CALL_IDS[0])
    thoughts = named_thoughts(REASONING)
    beside = probe.text({"role": "assistant", "content": CONTENT, **thoughts}) + probe.text(
        {**call, **thoughts}, result
    )
    inside = probe.text({"role": "assistant", "content": thought_parts(REASONING, CONTENT)})
    is_dumped = "'thinking'" in inside or '"thinking"' in inside
    return REASONING not in beside and REASONING in inside and CONTENT in inside and not is_dumped


def _takes_text_beside_thoughts(probe: Probe) -> bool:
    """Returns False if a message with a call may have either thoughts or content, but not both."""
    message = call_message([_ARGUMENTS], text_arguments=probe.text_arguments)
    thoughts, content = named_thoughts(REASONING), {"content": CONTENT}
    return not probe.text({**message, **thoughts}) or bool(probe.text({**message, **thoughts, **content}))


def _call_and_result(probe: Probe, call_id: str) -> tuple[Message, Message]:
    message = call_message([_ARGUMENTS], text_arguments=probe.text_arguments, call_ids=[call_id])
    return message, {"role": "tool", "tool_call_id": call_id, "name": NAMES[0], "content": RESULT}


def _takes_text(probe: Probe) -> bool:
    """Returns True if the template expects a tool call's arguments as JSON text, not as an object."""
    message = call_message([_ARGUMENTS], text_arguments=False)
    as_object = probe.text(message)
    if KEYS[0] in as_object and f"'{KEYS[0]}'" not in as_object:
        return False
    as_text = probe.text(call_message([_ARGUMENTS], text_arguments=True))
    return KEYS[0] in as_text and f'\\"{KEYS[0]}' not in as_text


def _shown_calls(source: str) -> Calls | None:
    return next((calls for marks, calls in SHOWN_CALLS if all(mark in source for mark in marks)), None)


def _derived_reasoning(probe: Probe) -> ReasoningTags | None:
    header = probe.content_text().partition(CONTENT)[0].rpartition(QUESTION)[2]
    prompt = probe.text(prompt=True)
    opening = prompt.rstrip().rpartition("\n")[2] if not last_markup(prompt) else ""
    for message in ({"content": CONTENT, **named_thoughts(REASONING)}, {"content": thought_parts(REASONING, CONTENT)}):
        text = probe.text({"role": "assistant", **message})
        before, _, behind = text.partition(REASONING)
        between, has_content, _ = behind.partition(CONTENT)
        end = first_markup(between)
        if not has_content or not end:
            continue
        begin = last_markup(before)
        if begin and (begin not in header or end in header) and begin not in opening:
            return ReasoningTags(begin, (end,))
        if opening:
            return ReasoningTags(opening, (end,))
    return None


def _shown_reasoning(source: str, probe: Probe) -> ReasoningTags | None:
    prompt = probe.text(prompt=True).rstrip()
    opened = next((tags for tags in KNOWN_REASONING if prompt.endswith((tags.begin, tags.end))), None)
    return opened or next((tags for tags in KNOWN_REASONING if tags.begin in source and tags.end in source), None)


def _wrappers(probe: Probe) -> tuple[str, ...]:
    """Returns the tags that the template puts only around content (not calls or reasoning), or () if there are none."""
    before, has_content, behind = probe.content_text().partition(CONTENT)
    call = probe.text(call_message([_ARGUMENTS], text_arguments=probe.text_arguments))
    prompt = probe.text(prompt=True)
    headers = [prompt if before.startswith(prompt) else "", common_begin(call, before) if NAMES[0] in call else ""]
    header = max(headers, key=len)
    begin, end = last_markup(before[len(header) :]), first_markup(behind)
    tags = () if probe.reasoning is None else (probe.reasoning.begin, *probe.reasoning.ends)
    return (begin, end) if has_content and header and begin and end and begin not in tags else ()
