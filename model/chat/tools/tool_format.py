"""The format of a model's reasoning and tool calls, which the parser, the grammar and the template probe use."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, auto
from typing import Final

CDATA_BEGIN: Final = "<![CDATA["
CDATA_END: Final = "]]>"
_BETWEEN_TAGS: Final = re.compile(r"\n|(?<=[>`])(?=<)")


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around reasoning. Any of `ends` ends the reasoning. `ends[0]` is the usual end tag."""

    begin: str
    ends: tuple[str, ...]
    repeats: bool = False  # True if reasoning may follow content too.

    @property
    def end(self) -> str:
        return self.ends[0]


@dataclass(frozen=True, slots=True)
class Frame:
    """Texts around tool calls. `section_begin` and `section_end` enclose all calls. `call_begin` and `call_end`
    enclose each call. Texts have no white space at their ends and may be empty. `call_begin` may have several lines."""

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
        """The texts at which tool calls may begin."""
        lines = self.lines  # Models may skip lines, so later tags such as `<call>` are triggers too.
        return tuple(line for place, line in enumerate(lines) if place == 0 or line[0] in "<[]")

    @property
    def ends(self) -> tuple[str, ...]:
        parts = _BETWEEN_TAGS.split(f"{self.call_end}\n{self.section_end}")
        return tuple(dict.fromkeys(part for part in map(str.strip, parts) if part))


@dataclass(frozen=True, slots=True)
class ObjectCalls:
    """Calls that are JSON objects, single or in a list. If `frame` has no markers, only an answer that begins with
    a call has calls."""

    frame: Frame
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    wrapper_key: str = ""  # Key of an outer object that has the call as its value.
    is_list: bool = False
    name_is_key: bool = False  # True for calls of the form {NAME: ARGUMENTS}.


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """Tool calls of the form NAME id_begin ID name_end ARGUMENTS, or ID name_begin NAME name_end ARGUMENTS. ARGUMENTS
    is a JSON object."""

    frame: Frame
    name_end: str = ""
    id_begin: str = ""  # Empty if no id follows the name.
    name_begin: str = ""  # Empty if no id precedes the name.
    has_name_in_id: bool = False  # True if `functions.NAME:0` replaces the name.


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Tool calls with markers around each key and value, such as <parameter=city>Rome</parameter>. If `value_begin` is
    set, an attribute stands between `key_end` and `value_begin`. The attribute of strings is `string_attribute`."""

    frame: Frame
    name_end: str
    argument_begin: str
    key_end: str
    value_end: str
    value_begin: str = ""
    string_attribute: str = ""
    value_indent: str = (
        ""  # White space, such as a line break, that the format adds before a value. Answers may omit it.
    )
    value_dedent: str = ""  # White space that the format adds after a value. Answers may omit it.
    has_cdata: bool = False  # True if texts may be CDATA sections.
    has_python_values: bool = False  # True if the format writes lists and objects like Python's `repr`.


class Notation(Enum):
    PYTHON = auto()  # NAME(key="text", other=1), single or in a list.
    GEMMA = auto()  # NAME{key:<|"|>text<|"|>,other:1}
    ELEMENTS = auto()  # An element for each key. Objects and lists have nested elements.


@dataclass(frozen=True, slots=True)
class NotatedCalls:
    """Tool calls in a notation other than JSON. `mark` delimits strings in GEMMA, and precedes each tag in ELEMENTS."""

    frame: Frame
    notation: Notation
    mark: str = ""


@dataclass(frozen=True, slots=True)
class ChannelCalls:
    """The format of answers that consist of messages with headers. Regular expressions find a tool's name
    (`recipient`), reasoning (`reasoning`) and other recipients (`ignored`) in a header."""

    message_begin: str  # Text before a header. A generation prompt ends with this text.
    header_end: str
    message_ends: tuple[str, ...]
    recipient: str
    reasoning: str
    ignored: str
    content_header: str  # Header of content, without `header_end`.
    reasoning_header: str
    call_header: str  # Header of a call. Contains {name}.
    calls: TaggedCalls | None = None  # Format of a call's body. None means that the body is JSON.


Calls = ObjectCalls | NamedCalls | TaggedCalls | NotatedCalls | ChannelCalls


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format of a model's answers (by default plain text), and the kinds of messages that its template renders."""

    calls: Calls | None = None
    reasoning: ReasoningTags | None = None
    dropped: tuple[str, ...] = ()  # Markers around content, which are removed from answers.
    calls_end_reasoning: bool = False  # True if a call may begin before the reasoning's end tag.
    takes_tools: bool = False  # True if the template shows `tools` to the model.
    takes_text_arguments: bool = False  # True if the template needs arguments as JSON text, not as an object.
    takes_tool_role: bool = True
    takes_call_messages: bool = True  # True if the template renders messages with `tool_calls`.
    takes_system_role: bool = True
    takes_thought_parts: bool = False  # True if the template reads thoughts only from parts of the content.
    takes_text_beside_thoughts: bool = True  # False if it refuses thoughts and content in a message with calls.
    call_id_length: int = 0  # Number of letters and digits that a call id must have. 0 means any id.

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
