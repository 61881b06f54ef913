"""The format of a model's reasoning and tool calls, as data for parser, grammar and template probe."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, auto
from typing import Final

_BETWEEN_TAGS: Final = re.compile(r"\n|(?<=[>`])(?=<)")


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around reasoning. Reasoning ends at the first tag of `ends` in the text. `ends[0]` is the usual tag."""

    begin: str
    ends: tuple[str, ...]
    repeats: bool = False  # reasoning may also follow content

    @property
    def end(self) -> str:
        return self.ends[0]


@dataclass(frozen=True, slots=True)
class Frame:
    """Texts around calls: `section_begin`, then for each call `call_begin`, the call and `call_end`, and then
    `section_end`. They have no white space at their ends, and may be empty. `call_begin` may have several lines."""

    section_begin: str = ""
    call_begin: str = ""
    call_end: str = ""
    section_end: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        parts = (*self.section_begin.split("\n"), *self.call_begin.split("\n"))
        return tuple(part for part in map(str.strip, parts) if part)

    @property
    def triggers(self) -> tuple[str, ...]:
        """The markers that begin calls: the first line, and lines that look like markup, because models skip lines."""
        lines = self.lines
        return tuple(line for place, line in enumerate(lines) if place == 0 or line[0] in "<[]")

    @property
    def ends(self) -> tuple[str, ...]:
        parts = _BETWEEN_TAGS.split(f"{self.call_end}\n{self.section_end}")
        return tuple(dict.fromkeys(part for part in map(str.strip, parts) if part))


@dataclass(frozen=True, slots=True)
class ObjectCalls:
    """Calls that are JSON objects, single or in a list. If the frame has no markers, the answer begins with calls."""

    frame: Frame
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    wrapper_key: str = ""  # the object is the value of this key
    is_list: bool = False
    name_is_key: bool = False  # {NAME: ARGUMENTS}


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """Calls of the form NAME id_begin ID name_end ARGUMENTS. ARGUMENTS is a JSON object."""

    frame: Frame
    name_end: str = ""
    id_begin: str = ""  # empty if there is no id
    has_name_in_id: bool = False  # functions.NAME:0 stands in place of the name


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Calls of a name and arguments, with markers around each key and value. If `value_begin` is set, it follows an
    attribute, which is `string_attribute` for strings and another text for other values."""

    frame: Frame
    name_end: str
    argument_begin: str
    key_end: str
    value_end: str
    value_begin: str = ""
    string_attribute: str = ""
    value_indent: str = ""  # white space before a value, which is no part of it, such as a line break
    value_dedent: str = ""  # white space after a value
    has_cdata: bool = False  # values may be CDATA sections


class Notation(Enum):
    PYTHON = auto()  # NAME(key="text", other=1), also in a list
    GEMMA = auto()  # NAME{key:<|"|>text<|"|>,other:1}
    ELEMENTS = auto()  # an element for each key, nested for objects and lists


@dataclass(frozen=True, slots=True)
class NotatedCalls:
    """Calls in a `Notation`. `mark` is the string delimiter of GEMMA, or the text before each tag of ELEMENTS."""

    frame: Frame
    notation: Notation
    mark: str = ""


@dataclass(frozen=True, slots=True)
class ChannelCalls:
    """An answer that consists of messages. A message's header names a recipient or channel. The regular expression
    `recipient` finds a tool's name, `reasoning` finds reasoning, and `ignored` finds recipients that are no tools."""

    message_begin: str  # before a header; the prompt ends with the first one
    header_end: str
    message_ends: tuple[str, ...]
    recipient: str
    reasoning: str
    ignored: str
    content_header: str  # the text after message_begin in a prompt that begins the content
    reasoning_header: str
    call_header: str  # with {name}
    calls: TaggedCalls | None = None  # the body of a call; arguments are JSON if None


Calls = ObjectCalls | NamedCalls | TaggedCalls | NotatedCalls | ChannelCalls


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format of a model's answers, and the parts of a chat that its template can render. The default is text."""

    calls: Calls | None = None
    reasoning: ReasoningTags | None = None
    dropped: tuple[str, ...] = ()  # markers around content, which are removed
    calls_end_reasoning: bool = False  # a call may begin before the reasoning's end marker
    takes_tools: bool = False  # the template shows `tools` to the model
    takes_text_arguments: bool = False  # the template needs the arguments of calls as JSON text, not as an object
    takes_tool_role: bool = True
    takes_call_messages: bool = True  # messages with `tool_calls`
    takes_system_role: bool = True
    call_id_length: int = 0  # the template takes only call ids with so many letters and digits; 0 for any id

    @property
    def knows_reasoning(self) -> bool:
        return self.reasoning is not None or isinstance(self.calls, ChannelCalls)

    @property
    def markers(self) -> tuple[str, ...]:
        return (*_texts_in(self.calls), *_texts_in(self.reasoning), *self.dropped)


def _texts_in(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, tuple):
        return tuple(text for item in value for text in _texts_in(item))
    if is_dataclass(value):
        return tuple(text for item in fields(value) for text in _texts_in(getattr(value, item.name)))
    return ()
