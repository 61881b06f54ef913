"""Prompts and chats with the options of their answers. Checks options that never reach the scheduler, such as `n`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Final

from llamaclust.cluster.front.text.images import PromptImages
from llamaclust.cluster.scheduler.dry_breakers import DEFAULT_BREAKERS, MAX_BREAKER_BYTES, MAX_BREAKERS
from llamaclust.cluster.scheduler.requests import AnswerOptions
from llamaclust.cluster.scheduler.validation import MAX_CHOICES, check_count, check_integer, shown
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.chat.tools.answer_parser import AnswerParser
from llamaclust.model.chat.tools.call_sink import Tools
from llamaclust.model.chat.tools.tool_format import ToolFormat

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKENS = 1024
MAX_SALT_CHARACTERS = 256
MAX_BEGUN_CHARACTERS = 1 << 18
"""Maximum number of characters of a continued message, summed over all choices. Parsing them takes two seconds."""
SEEDS = 1 << 64

_DRAWN_SEED_BITS = 53
"""Bits of a random seed. JSON readers that use doubles for numbers read such a seed exactly."""

Answered = Mapping[int, tuple[RowResult, ...]]
"""Tokens that an earlier coordinator sampled for the choices of a request, by index of the choice."""


MAX_MESSAGE_CHARACTERS: Final = 2048


@dataclass(frozen=True, slots=True)
class AnswerParsing:
    """Describes how to parse the text of an answer. All choices of a request share it."""

    form: ToolFormat
    tools: Tools = field(default_factory=dict)
    splits_reasoning: bool = True
    most_calls: int | None = None
    begun: str = ""  # Beginning of the answer that the prompt already contains.
    reads_unmarked: bool = False  # True to find tool calls without markers in an answer that has no other text.
    shown_control_ids: frozenset[int] = frozenset()  # Control tokens whose text the parser must see.

    @property
    def is_thinking(self) -> bool:
        tags = self.form.reasoning
        return tags is not None and tags.begin in self.begun and tags.end not in self.begun

    @property
    def _has_begun_text(self) -> bool:
        tags = self.form.reasoning
        return not self.is_thinking and bool(self.begun.rpartition("\0" if tags is None else tags.end)[2].strip())

    def parser(self) -> AnswerParser:
        return AnswerParser(
            self.form,
            self.tools,
            splits_reasoning=self.splits_reasoning,
            most_calls=self.most_calls,
            begun=self.begun,
            reads_unmarked=self.reads_unmarked and not self._has_begun_text,
        )


@dataclass(frozen=True, slots=True)
class CompletionRequest(AnswerOptions):
    """A prompt and the options of its completion."""

    prompt: str | tuple[int, ...] | PromptImages
    # None: until the context is full. 0: the prompt is computed and nothing is generated.
    max_new_tokens: int | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None  # From -2**63 to 2**64 - 1, as two's complement if negative. None: drawn at random.
    stop: tuple[str, ...] = ()  # Stop strings. The answer ends before the first stop string in it.
    stop_token_ids: frozenset[int] = frozenset()  # End tokens besides the model's own.
    min_tokens: int = 0  # Stop strings and end tokens do not end a shorter answer.
    ignore_eos: bool = False  # True if end-of-generation tokens are never sampled.
    n: int = 1
    penalty_window: int | None = None  # Number of last tokens that penalties count. None: all tokens.
    penalize_nl: bool = True  # True if penalties count line breaks too.
    dry_window: int | None = None  # Number of last tokens in which DRY looks for repetitions. None: all tokens.
    dry_breakers: tuple[str, ...] = DEFAULT_BREAKERS  # Texts at which DRY ends a repetition.
    add_special: bool = True  # True to add BOS (and EOS) if the model wants them.
    parse_special: bool = True  # True to encode control words in a text prompt as control tokens.
    request_id: str | None = None  # Id of the request. None: drawn at random.
    group: str = ""  # Id that all prompts of one HTTP request share.
    reading: AnswerParsing | None = None  # None if the answer's text is not parsed.
    answered: Answered = field(default_factory=dict)  # First tokens of choices, if an earlier coordinator sampled them.
    slot: int | None = None  # Slot that records the tokens, if slots are kept.

    @property
    def answer_stop_ids(self) -> frozenset[int]:
        """The tokens of `stop_token_ids` if the answer may have thoughts, which they do not end."""
        has_thoughts = self.reading is not None and self.reading.form.knows_reasoning
        return self.stop_token_ids if has_thoughts else frozenset()

    @property
    def begun_characters(self) -> int:
        """Number of characters of the continued message in the prompt, counted once for each choice."""
        return 0 if self.reading is None else len(self.reading.begun) * self.n

    @property
    def setup_characters(self) -> int:
        """Number of characters to process before generation: the continued messages and the stop strings."""
        return self.begun_characters + sum(map(len, self.stop))

    def check_begun(self) -> None:
        if self.begun_characters > MAX_BEGUN_CHARACTERS:
            reason = f"{self.n} answers would read {self.begun_characters} characters of the continued message; "
            param = "n" if self.n > 1 else "messages"
            raise ParameterError(param, f"{reason}the limit is {MAX_BEGUN_CHARACTERS}")

    def check_text(self) -> None:
        """Checks fields that the scheduler does not check, such as `n` and `stop`. Raises ParameterError."""
        if self.max_new_tokens is not None:
            check_integer("max_tokens", self.max_new_tokens, 0, MAX_CONTEXT_TOKENS)
            check_integer("min_tokens", self.min_tokens, 0, MAX_CONTEXT_TOKENS)
            if self.min_tokens > self.max_new_tokens:
                reason = f"expected at most max_tokens, which is {self.max_new_tokens}, found {self.min_tokens}"
                raise ParameterError("min_tokens", reason)
        check_integer("n", self.n, 1, MAX_CHOICES)
        if self.seed is not None:
            check_integer("seed", self.seed, -SEEDS // 2, SEEDS - 1)
        if self.ignore_eos and self.stop_token_ids:
            reason = f"expected no token ids with ignore_eos, found {len(self.stop_token_ids)}"
            raise ParameterError("stop_token_ids", reason)
        check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS, "token ids")
        self.check_begun()
        _check_stop(self.stop)
        _check_breakers(self.dry_breakers)


def draw_seed() -> int:
    return secrets.randbits(_DRAWN_SEED_BITS)


Variables = Mapping[str, Any]


class ToolMode(Enum):
    AUTO = auto()  # The model decides whether to call tools.
    NONE = auto()
    REQUIRED = auto()  # The answer must have at least one call.


@dataclass(frozen=True, slots=True)
class ToolUse:
    mode: ToolMode = ToolMode.AUTO
    name: str | None = None  # Name of the only tool that may be called. None: any tool.
    is_parallel: bool = True  # True if an answer may have several calls.

    @classmethod
    def of(cls, mode: ToolMode, name: str | None, is_parallel: bool | None) -> ToolUse:
        """Makes a ToolUse. If `is_parallel` is None, several calls are allowed unless a call is required."""
        return cls(mode, name, mode is not ToolMode.REQUIRED if is_parallel is None else is_parallel)

    def check(self, tools: Sequence[Variables]) -> None:
        names = [tool["function"]["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise ParameterError("tools", "expected functions with different names, found two with the same name")
        if self.name is not None and self.name not in names:
            raise ParameterError("tool_choice", f"expected the name of one of the tools, found {self.name[:60]!r}")
        if self.mode is ToolMode.REQUIRED and not names:
            raise ParameterError("tool_choice", "expected tools that may be called, found none")


class PromptEnd(Enum):
    GENERATION_PROMPT = auto()  # The prompt ends with the beginning of a new answer.
    LAST_MESSAGE = auto()  # The prompt ends with the text of the last message, which the answer continues.
    NOTHING = auto()  # The prompt ends with the end of the last message.


@dataclass(frozen=True, slots=True)
class ReasoningBudget:
    """Limits the number of reasoning tokens. At the limit, the engine forces `message` and the closing tag."""

    tokens: int
    message: str = ""


SWITCH_VARIABLES: Final[Mapping[str, tuple[Any, Any]]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning": (False, True),
    "thinking_mode": ("disabled", "enabled"),
}
"""Variables of chat templates that switch reasoning: their values for off and on."""
BUDGET_VARIABLE: Final = "thinking_budget"
EFFORT_VARIABLES: Final = ("reasoning_effort", "thinking_effort")


@dataclass(frozen=True, slots=True)
class Thoughts:
    """A request for reasoning before the answer, or against it, and its amount."""

    is_on: bool | None = None  # None: the chat template decides.
    effort: str | None = None  # Amount of reasoning, such as `low`. The chat template decides what it means.
    budget: ReasoningBudget | None = None
    variables: Variables = field(default_factory=dict)  # Variables that override those of the other fields.

    @property
    def are_allowed(self) -> bool:
        return self.is_on is not False and (self.budget is None or self.budget.tokens > 0)

    @property
    def limit(self) -> ReasoningBudget | None:
        """The limit that the engine applies. Thoughts that are off end at their first token."""
        return ReasoningBudget(0) if self.is_on is False else self.budget

    @property
    def template_variables(self) -> dict[str, Any]:
        if not self.are_allowed:
            return {**_switched(is_on=False), BUDGET_VARIABLE: 0, **self.variables}
        budget = {} if self.budget is None else {BUDGET_VARIABLE: self.budget.tokens}
        effort = {} if self.effort is None else dict.fromkeys(EFFORT_VARIABLES, self.effort)
        switched = _switched(is_on=True) if self.is_on or effort else {"enable_thinking": True}
        return {**switched, **budget, **effort, **self.variables}


def _switched(*, is_on: bool) -> dict[str, Any]:
    return {name: values[is_on] for name, values in SWITCH_VARIABLES.items()}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    messages: tuple[Variables, ...]  # In the form that chat templates expect, with role, content and so on.
    # Options of the answer. The rendered chat replaces its prompt.
    answer: CompletionRequest = field(default_factory=lambda: CompletionRequest(()))
    tools: tuple[Variables, ...] = ()  # OpenAI definitions, which the template writes into the prompt.
    variables: Variables = field(default_factory=dict)  # Additional variables for the template.
    end: PromptEnd = PromptEnd.GENERATION_PROMPT
    tool_use: ToolUse = field(default_factory=ToolUse)
    splits_reasoning: bool = True  # True to separate reasoning from the content.
    thoughts: Thoughts = field(default_factory=Thoughts)
    created: float = field(default_factory=time.time)  # Unix time in seconds. It is the current time for templates.
    # Fetched images by the http(s) URLs in the messages.
    images: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def admitted(self, created: float, adapters: AdapterScales) -> ChatRequest:
        return replace(self, created=created, answer=replace(self.answer, adapters=adapters))

    @property
    def offered_tools(self) -> tuple[Variables, ...]:
        named = self.tool_use.name
        if self.tool_use.mode is ToolMode.NONE:
            return ()
        return tuple(tool for tool in self.tools if named is None or named == tool["function"]["name"])

    @property
    def uses_tools(self) -> bool:
        return bool(self.offered_tools) or any(
            message.get("tool_calls") or message.get("role") == "tool" for message in self.messages
        )

    @property
    def has_documents(self) -> bool:
        return bool(self.variables.get("documents"))

    def reading(self, form: ToolFormat, begun: str) -> AnswerParsing | None:
        """Returns a description of how to parse the answer, or None if its text needs no parsing."""
        schemas = {
            str(tool["function"]["name"]): tool["function"].get("parameters") or {} for tool in self.offered_tools
        }
        if not (schemas or form.dropped or form.knows_reasoning):
            return None
        most_calls = None if self.tool_use.is_parallel else 1
        may_be_unmarked = self.tool_use.mode is ToolMode.AUTO and self.answer.grammar is None
        return AnswerParsing(
            form, schemas, self.splits_reasoning, most_calls, begun, reads_unmarked=bool(schemas) and may_be_unmarked
        )

    def count_characters(self) -> int:
        """Counts the characters of contents, reasoning, tool calls and tools."""
        contents = [message.get(name) for message in self.messages for name in ("content", "reasoning_content")]
        contents += [part.get("text") for each in contents if isinstance(each, list) for part in each]
        calls = (call for message in self.messages for call in message.get("tool_calls") or ())
        texts = [*contents, *(call["function"].get("arguments") for call in calls)]
        tools = self.offered_tools
        written = len(json.dumps(tools, ensure_ascii=False)) if tools else 0
        return written + sum(len(text) for text in texts if isinstance(text, str))


def prompt_end(
    roles: Sequence[str], continue_final_message: bool | None, add_generation_prompt: bool | None
) -> PromptEnd:
    """Determines how the prompt ends. Raises ParameterError if the fields contradict each other."""
    is_answered = roles[-1:] == ["assistant"]
    if continue_final_message is None:
        # llama.cpp has the same rule.
        continue_final_message = is_answered and not add_generation_prompt
        if continue_final_message and roles[-2:-1] == ["assistant"]:
            reason = "expected one message of role assistant at the end, which is continued, found two"
            raise ParameterError("messages", reason)
    elif continue_final_message and add_generation_prompt:
        raise ParameterError("continue_final_message", "conflicts with add_generation_prompt: true; set one of them")
    if continue_final_message:
        if not is_answered:
            found = f"found {roles[-1][:60]!r}" if roles else "found no messages"
            raise ParameterError("continue_final_message", f"expected a last message of role assistant, {found}")
        return PromptEnd.LAST_MESSAGE
    return PromptEnd.NOTHING if add_generation_prompt is False else PromptEnd.GENERATION_PROMPT


def _check_stop(stop: Sequence[str]) -> None:
    check_count("stop", len(stop), MAX_STOP_STRINGS, "stop strings")
    for text in stop:
        if not text:
            raise ParameterError("stop", "expected stop strings that are not empty, found an empty one")
        if len(text) > MAX_STOP_CHARACTERS:
            reason = f"expected a stop string of at most {MAX_STOP_CHARACTERS} characters, found {len(text)}"
            raise ParameterError("stop", reason)


def _check_breakers(texts: Sequence[str]) -> None:
    check_count("dry_sequence_breakers", len(texts), MAX_BREAKERS, "texts")
    for text in texts:
        if not 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_BREAKER_BYTES:
            reason = f"expected 1 to {MAX_BREAKER_BYTES} bytes of UTF-8, found {shown(text)}"
            raise ParameterError("dry_sequence_breakers", reason)
