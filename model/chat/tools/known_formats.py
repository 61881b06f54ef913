"""Answer formats for chat templates whose output does not reveal the format. Texts in the template identify them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llamaclust.model.chat.tools.tool_format import (
    Calls,
    ChannelCalls,
    Frame,
    NamedCalls,
    NotatedCalls,
    Notation,
    ObjectCalls,
    ReasoningTags,
    TaggedCalls,
)

GENERIC_CALLS: Final = ObjectCalls(Frame(call_begin="<tool_call>", call_end="</tool_call>"))
"""The format of Hermes and Qwen. If the template has no tool calls, the prompt tells the model to use this format."""


@dataclass(frozen=True, slots=True)
class KnownFormat:
    """The answer format of templates that contain all texts in `marks`. Fields that are None or empty are unknown."""

    marks: tuple[str, ...]
    calls: Calls | None = None
    reasoning: ReasoningTags | None = None
    dropped: tuple[str, ...] = ()
    calls_end_reasoning: bool = False


_HARMONY: Final = ChannelCalls(
    message_begin="<|start|>assistant",
    header_end="<|message|>",
    message_ends=("<|end|>", "<|call|>", "<|return|>"),
    recipient=r"to=functions\.([\w.\-]+)",
    reasoning=r"<\|channel\|>analysis(?!.*to=)",
    ignored=r"to=(?!assistant|user)\S",
    content_header="<|channel|>final",
    reasoning_header="<|channel|>analysis",
    call_header=" to=functions.{name}<|channel|>commentary json",
)

_MUSE: Final = ChannelCalls(
    message_begin="<|start|>assistant",
    header_end="<|message|>",
    message_ends=("<|eom|>", "<|eot|>"),
    recipient=r"to=(?!self\b|user\b)([\w.\-]+)",
    reasoning=r"to=self\b",
    ignored=r"(?!)",
    content_header=" to=user",
    reasoning_header=" to=self",
    call_header=" to={name}",
    calls=TaggedCalls(
        Frame("<atem:function_calls>", '<atem:invoke name="', "</atem:invoke>", "</atem:function_calls>"),
        name_end='">',
        argument_begin='<atem:parameter name="',
        key_end='">',
        value_end="</atem:parameter>",
    ),
)

_FUNCTIONARY_3_2: Final = ChannelCalls(
    message_begin=">>>",
    header_end="\n",
    message_ends=(),
    recipient=r"^\s*(?!all\s*$)([\w.\-]+)\s*$",
    reasoning=r"(?!)",
    ignored=r"(?!)",
    content_header="all",
    reasoning_header="all",
    call_header="{name}",
)

_LFM2: Final = NotatedCalls(Frame("<|tool_call_start|>", section_end="<|tool_call_end|>"), Notation.PYTHON)

KNOWN_FORMATS: Final = (
    KnownFormat(("<|channel|>", "<|start|>"), _HARMONY),
    KnownFormat(("<atem:function_calls>",), _MUSE),
    KnownFormat((">>>all",), _FUNCTIONARY_3_2),
    KnownFormat(
        ("<|tool_call>", '<|"|>'),
        NotatedCalls(Frame(call_begin="<|tool_call>call:", call_end="<tool_call|>"), Notation.GEMMA, '<|"|>'),
        ReasoningTags("<|channel>thought", ("<channel|>",), repeats=True),
        ("<|channel>",),
    ),
    KnownFormat(("<|tool_call_start|>",), _LFM2),
    KnownFormat(("<|tool_list_start|>",), _LFM2),
    KnownFormat(("List of tools: [", "keep_past_thinking"), _LFM2),
    KnownFormat(
        ("<|open|>", "<|sep|>"),
        TaggedCalls(
            Frame("<|open|>tools<|sep|>", '<|open|>call tool="', "<|close|>call<|sep|>", "<|close|>tools<|sep|>"),
            name_end='"',
            argument_begin='<|open|>argument key="',
            key_end='" type="',
            value_begin='"<|sep|>',
            string_attribute="string",
            value_end="<|close|>argument<|sep|>",
        ),
        ReasoningTags("<|open|>think<|sep|>", ("<|close|>think<|sep|>", "<|open|>response<|sep|>")),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
    ),
    KnownFormat(
        ("]<]minimax[>[",),
        NotatedCalls(
            Frame("]<]minimax[>[<tool_call>", ']<]minimax[>[<invoke name="', section_end="]<]minimax[>[</tool_call>"),
            Notation.ELEMENTS,
            "]<]minimax[>[",
        ),
    ),
    KnownFormat(
        ("<|tool_calls_section_begin|>",),
        NamedCalls(
            Frame(
                "<|tool_calls_section_begin|>",
                "<|tool_call_begin|>",
                "<|tool_call_end|>",
                "<|tool_calls_section_end|>",
            ),
            "<|tool_call_argument_begin|>",
            has_name_in_id=True,
        ),
        ReasoningTags("<think>", ("</think>",)),
        calls_end_reasoning=True,
    ),
    KnownFormat(("<|role_end|>",), dropped=("<|role_end|>",)),
)

SHOWN_CALLS: Final = (
    (
        ("<｜tool▁calls▁begin｜>",),
        NamedCalls(
            Frame(
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                "```\n<｜tool▁call▁end｜>",
                "<｜tool▁calls▁end｜>",
            ),
            "```json",
        ),
    ),
    (("[TOOL_CALLS]", "[ARGS]"), NamedCalls(Frame(call_begin="[TOOL_CALLS]"), "[ARGS]")),
    (("[TOOL_CALLS]",), ObjectCalls(Frame("[TOOL_CALLS]"), is_list=True)),
    (
        ("<tool_call>", "<function="),
        TaggedCalls(
            Frame(call_begin="<tool_call>\n<function=", call_end="</function>\n</tool_call>"),
            ">",
            "<parameter=",
            ">",
            "</parameter>",
            value_indent="\n",
            value_dedent="\n",
        ),
    ),
    (("<tool_call>",), GENERIC_CALLS),
    (("<function=",), NamedCalls(Frame(call_begin="<function=", call_end="</function>"), ">")),
    (
        ("<|START_ACTION|>",),
        ObjectCalls(
            Frame("<|START_ACTION|>", section_end="<|END_ACTION|>"),
            "tool_name",
            "parameters",
            "tool_call_id",
            is_list=True,
        ),
    ),
    (
        ("Action:", "```json"),
        ObjectCalls(Frame("Action:\n```json", section_end="```"), "tool_name", "parameters", is_list=True),
    ),
    (("functools[",), ObjectCalls(Frame("functools"), is_list=True)),
)
"""Tool-call formats that a template only describes in words. Such a template does not render calls in messages."""

KNOWN_REASONING: Final = (
    ReasoningTags("<think>", ("</think>",)),
    ReasoningTags("[THINK]", ("[/THINK]",)),
    ReasoningTags("<|START_THINKING|>", ("<|END_THINKING|>",)),
    ReasoningTags("<seed:think>", ("</seed:think>",)),
    ReasoningTags("<mm:think>", ("</mm:think>",)),
    ReasoningTags("<thinking>", ("</thinking>",)),
    ReasoningTags("<reasoning>", ("</reasoning>",)),
)
"""Reasoning tags, which are searched for in the source of a template that does not render reasoning."""
