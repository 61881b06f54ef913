"""Bodies of OpenAI's endpoints, with vLLM's and llama.cpp's names for further fields."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo

from llamaclust.cluster.front.dialects.openai.tools import CallField, ContentField, ToolFields
from llamaclust.cluster.front.foreign_fields import CHAT, COMPLETION, MESSAGE
from llamaclust.cluster.front.sampling import (
    AdapterFields,
    Requested,
    SamplerFields,
    SlotFields,
    SpeculativeFields,
    documented,
    sampled,
)
from llamaclust.cluster.front.schema import (
    BiasField,
    Body,
    LimitField,
    Prompt,
    PromptsField,
    SeedField,
    StopField,
    read_part,
)
from llamaclust.cluster.front.structured_output import GrammarFields
from llamaclust.cluster.front.text.request import (
    MAX_SALT_CHARACTERS,
    MAX_STOP_TOKENS,
    ChatRequest,
    CompletionRequest,
    PromptEnd,
    effort_variables,
    prompt_end,
)
from llamaclust.cluster.scheduler.validation import MAX_CHOICES, shown
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS, Dialect

DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(Body):
    """Additions to a stream beside the answer."""

    include_usage: bool = False
    """A last chunk with the tokens counted."""
    include_obfuscation: bool = False
    """No-op: chunks are never padded."""
    continuous_usage_stats: bool = False
    """Each chunk carries the tokens counted so far; only with `include_usage`."""


class Message(Body, foreign=MESSAGE):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is another name of `system`."""
    content: ContentField = ""
    """Text, or parts of type `text`; a short text stands in place of a picture, sound or a file."""
    name: str | None = None
    """Passed to the chat template."""
    reasoning_content: str | None = None
    """Reasoning of an earlier answer, sent back; passed to the chat template."""

    tool_calls: list[CallField] | None = None
    """An assistant's calls, sent back."""
    tool_call_id: str | None = None
    """The call that a message of role `tool` answers."""

    def as_variables(self) -> dict[str, Any]:
        """Returns the message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        more = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": self.tool_calls or None,
            "tool_call_id": self.tool_call_id,
        }
        given = {name: value for name, value in more.items() if value is not None}
        return {"role": role, "content": self.content, **given}


def _message(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("a message must be an object with 'role' and 'content'")
    message = read_part(Message, value, info.context)
    if "content" not in message.model_fields_set and message.role not in ("assistant", "tool"):
        raise ValueError("content: is missing")
    if message.tool_calls and message.role != "assistant":
        raise ValueError(f"tool_calls: a message of role {message.role!r} has none")
    return message


MessagesField = Annotated[
    list[Annotated[Message, BeforeValidator(_message)]], FailFast(), Field(min_length=1, max_length=16_384)
]


class ChatFields(ToolFields):
    """The parts of a chat's prompt."""

    messages: MessagesField
    """The chat so far."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More variables for the chat template."""
    documents: list[dict[str, Any]] = Field(default_factory=list, max_length=1024)
    """Texts for the chat template, each an object, such as `{"title": ..., "text": ...}`."""
    reasoning_effort: str | None = None
    """Passed to the chat template; none sets its `enable_thinking` to false."""
    add_generation_prompt: bool | None = None
    """true: the prompt ends with the beginning of an answer; the default unless the last message is continued."""
    continue_final_message: bool | None = None
    """true: the answer continues the last message; the default for an assistant's message."""

    @property
    def variables(self) -> tuple[dict[str, Any], ...]:
        return tuple(message.as_variables() for message in self.messages)

    @property
    def template_variables(self) -> dict[str, Any]:
        documents = {"documents": self.documents} if self.documents else {}
        return effort_variables(self.reasoning_effort) | documents | self.chat_template_kwargs

    @property
    def prompt_end(self) -> PromptEnd:
        roles = [message.role for message in self.messages]
        return prompt_end(roles, self.continue_final_message, self.add_generation_prompt)


@sampled(Dialect.OPENAI)
class GenerationBody(SamplerFields, GrammarFields, AdapterFields, SlotFields, SpeculativeFields):
    model: str | None = None
    """The served model's name, or that of an adapter; another name is refused."""
    logit_bias: BiasField = ()
    """Added to the logits of these token ids."""
    seed: Annotated[SeedField, Requested()] = None
    """The same seed gives the same answer; drawn and returned where it is absent or -1."""
    stop: Annotated[StopField, Requested()] = ()
    """The answer ends before the first of these."""
    stop_token_ids: Annotated[list[int], FailFast(), Field(default_factory=list, max_length=MAX_STOP_TOKENS)]
    """More tokens that end an answer."""
    min_tokens: Annotated[int, Requested()] = 0
    """Number of tokens before which nothing ends the answer."""
    ignore_eos: Annotated[bool, Requested()] = False
    """The model may not end its answer."""
    n: Annotated[int, Requested()] = 1
    """Answers to each prompt."""
    timings_per_token: bool = False
    """llama.cpp's `timings` in each event of a stream and in the reply."""
    return_progress: bool = False
    """A stream begins with events that say how far the prompt is computed, as llama.cpp's."""
    verbose: bool = False
    """The reply, or a stream's last event of a choice, has the prompt's text as `__verbose.prompt`, as llama.cpp's."""
    stream: bool = False
    """Server-sent events."""
    stream_options: StreamOptions | None = None
    """Additions to the stream; needs `stream`."""
    cache_salt: Annotated[str, Requested()] = Field(default="", max_length=MAX_SALT_CHARACTERS)
    """Salt of the prefix cache: requests share beginnings of prompts if their salts are equal."""
    return_token_ids: bool = False
    """Adds `token_ids` and `prompt_token_ids` to each choice."""

    @property
    @abstractmethod
    def with_logprobs(self) -> bool:
        """True if the reply has logprobs."""

    @property
    def has_measurements(self) -> bool:
        """True if a stream shows times, or the prefix cache's tokens."""
        options = self.stream_options or StreamOptions()
        return (
            self.timings_per_token or self.return_progress or (options.include_usage and options.continuous_usage_stats)
        )

    def _request(self, prompt: Prompt, max_new_tokens: int | None, **more: Any) -> CompletionRequest:
        """Makes the completion of one prompt; `more` are further fields of CompletionRequest."""
        return self.completion(
            prompt,
            max_new_tokens,
            self.params(self.logit_bias),
            stop_token_ids=frozenset(self.stop_token_ids),
            grammar=self.answer_grammar(),
            slot=self.slot,
            with_logprobs=self.with_logprobs,
            **more,
        )

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "only makes sense with stream: true")


class ChatBody(GenerationBody, ChatFields, foreign=CHAT):
    """`POST /v1/chat/completions`."""

    max_tokens: LimitField = None
    """Tokens of an answer, at most; by default and for -1 what the context leaves."""
    max_completion_tokens: LimitField = None
    """The newer name of max_tokens."""
    logprobs: bool = False
    """Logprobs of the chosen tokens."""
    top_logprobs: int | None = None
    """Number of likeliest tokens whose logprobs are shown too; needs `logprobs`."""

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs

    def check(self) -> None:
        super().check()
        self.choice.check()
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            reason = f"is {shown(new)}, but max_tokens is {shown(old)}: give one of them"
            raise ParameterError("max_completion_tokens", reason)
        if self.top_logprobs is not None and not self.logprobs:
            raise ParameterError("top_logprobs", "only makes sense with logprobs: true")

    def request(self) -> ChatRequest:
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return ChatRequest(
            self.variables,
            self._request((), most, top_logprobs=self.top_logprobs or 0),
            self.choice.offered,
            self.template_variables,
            self.prompt_end,
            self.choice.use,
            self.reasoning_format != "none",
            self.reasoning_budget != 0,
            self.answer_budget,
        )


class CompletionBody(GenerationBody, foreign=COMPLETION):
    """`POST /v1/completions`."""

    prompt: PromptsField
    """Text, token ids, or a list of either."""
    max_tokens: LimitField = DEFAULT_COMPLETION_TOKENS
    """Tokens of an answer, at most; -1: what the context leaves; 0: `echo` and `logprobs` give the prompt's alone."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Number of likeliest tokens whose logprobs are shown beside the chosen token's."""
    echo: bool = False
    """The prompt precedes the answer, with its logprobs if they are requested."""
    score_from: Annotated[int, documented(0, MAX_CONTEXT_TOKENS)] | None = None
    """First prompt token that gets logprobs, for `echo` and `logprobs`; saves work."""
    best_of: int | None = None
    """Must equal n."""
    add_special_tokens: Annotated[bool, Requested("add_special")] = True
    """BOS where the model wants it."""
    parse_special: Annotated[bool, Requested()] = True
    """Control words in a prompt's text become their tokens."""

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs is not None

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n):
            raise ParameterError("best_of", f"is {shown(self.best_of)}, but only n, {shown(self.n)}, is supported")
        if self.score_from is not None and (not self.echo or self.logprobs is None):
            raise ParameterError("score_from", "only makes sense with echo and logprobs")
        answers = len(self.prompt) * self.n
        if answers > MAX_CHOICES:
            prompts = f" to {len(self.prompt)} prompts" if len(self.prompt) > 1 else ""
            raise ParameterError("n", f"asks for {shown(answers)} answers{prompts}, at most {MAX_CHOICES} are given")

    def requests(self) -> list[CompletionRequest]:
        """Makes a completion for each prompt."""
        more = {
            "top_logprobs": self.logprobs or 0,
            "score_from": (self.score_from or 0) if self.echo and self.logprobs is not None else None,
        }
        first = self._request(self.prompt[0], self.max_tokens, **more)
        return [first, *(replace(first, prompt=prompt) for prompt in self.prompt[1:])]
