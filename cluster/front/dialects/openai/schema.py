"""Request bodies of chat and text completions. Fields that OpenAI's API lacks have names from vLLM or llama.cpp."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo

from llamaclust.cluster.front.dialects.openai.tools import CallField, ContentField, ToolFields
from llamaclust.cluster.front.foreign_fields import CHAT, COMPLETION, MESSAGE
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
from llamaclust.cluster.front.sent_thoughts import with_thoughts
from llamaclust.cluster.front.shared_fields import (
    AdapterFields,
    Requested,
    SaltFields,
    SamplerFields,
    SlotFields,
    SpeculativeFields,
    documented,
    sampled,
)
from llamaclust.cluster.front.structured_output import GrammarFields
from llamaclust.cluster.front.text.request import (
    MAX_STOP_TOKENS,
    ChatRequest,
    CompletionRequest,
    PromptEnd,
    prompt_end,
)
from llamaclust.cluster.scheduler.validation import MAX_CHOICES, shown
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler.fields import Dialect

DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(Body):
    include_usage: bool = False
    """True to add a last chunk with the token counts."""
    include_obfuscation: bool = False
    """Accepted without effect, because chunks are never padded."""
    continuous_usage_stats: bool = False
    """True to show the token counts so far in each chunk. Requires `include_usage`."""


class Message(Body, foreign=MESSAGE):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is another name of `system`."""
    content: ContentField = ""
    """A text, or parts of type `text` and `image_url`. Short texts replace media that the model cannot read."""
    name: str | None = None
    """A name that the chat template receives."""
    reasoning_content: str | None = None
    """The reasoning of an earlier answer, also as `reasoning` or `thinking`. The chat template receives it."""

    tool_calls: list[CallField] | None = None
    tool_call_id: str | None = None
    """Id of the tool call that returned this result. It is used with the role `tool`."""

    def as_variables(self) -> dict[str, Any]:
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
    message = read_part(Message, with_thoughts(value, info.context), info.context)
    if "content" not in message.model_fields_set and message.role not in ("assistant", "tool"):
        raise ValueError("content: is missing")
    if message.tool_calls and message.role != "assistant":
        raise ValueError(f"tool_calls: not allowed for role {message.role!r}")
    return message


MessagesField = Annotated[
    list[Annotated[Message, BeforeValidator(_message)]], FailFast(), Field(min_length=1, max_length=16_384)
]


class ChatFields(ToolFields):
    messages: MessagesField
    documents: list[dict[str, Any]] = Field(default_factory=list, max_length=1024)
    """Documents for the chat template, each an object such as `{"title": ..., "text": ...}`."""
    add_generation_prompt: bool | None = None
    """True to end the prompt with the beginning of a new answer. The default is true, unless a message is continued."""
    continue_final_message: bool | None = None
    """True to continue the last message in the answer. The default is true if that message has the role assistant."""

    @property
    def variables(self) -> tuple[dict[str, Any], ...]:
        return tuple(message.as_variables() for message in self.messages)

    @property
    def template_variables(self) -> dict[str, Any]:
        return {"documents": self.documents} if self.documents else {}

    @property
    def prompt_end(self) -> PromptEnd:
        roles = [message.role for message in self.messages]
        return prompt_end(roles, self.continue_final_message, self.add_generation_prompt)


@sampled(Dialect.OPENAI)
class GenerationBody(SamplerFields, GrammarFields, AdapterFields, SlotFields, SpeculativeFields, SaltFields):
    model: str | None = None
    """Name of the model or of an adapter. Other names are refused, unless `api.strict_model` is false."""
    logit_bias: BiasField = ()
    """Biases by token id. They are added to the logits."""
    seed: Annotated[SeedField, Requested()] = None
    """Seed of the random numbers. The same seed gives the same answer. The default, or -1, is a random seed."""
    stop: Annotated[StopField, Requested()] = ()
    """Texts that end the answer. The answer ends before the first occurrence of any of them."""
    stop_token_ids: Annotated[list[int], FailFast(), Field(default_factory=list, max_length=MAX_STOP_TOKENS)]
    """Ids of additional tokens that end an answer."""
    min_tokens: Annotated[int, Requested()] = 0
    """The minimum number of tokens in an answer. Nothing ends the answer earlier."""
    ignore_eos: Annotated[bool, Requested()] = False
    """True to prevent the model from ending its answer."""
    n: Annotated[int, Requested()] = 1
    """The number of answers to each prompt."""
    timings_per_token: bool = False
    """True to add llama.cpp's `timings` to the reply and to each event of a stream."""
    return_progress: bool = False
    """True to begin a stream with events that show how many prompt tokens are computed so far, as in llama.cpp."""
    verbose: bool = False
    """True to add the prompt's text, as `__verbose.prompt`, to the reply or to each choice's last event."""
    stream: bool = False
    """True to send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Options of the stream. They require `stream`."""
    return_token_ids: bool = False
    """True to add `token_ids` and `prompt_token_ids` to each choice."""

    @property
    @abstractmethod
    def with_logprobs(self) -> bool:
        """True if the reply shows logprobs."""

    @property
    def answers(self) -> int:
        """The number of answers in the reply."""
        return self.n

    @property
    def has_measurements(self) -> bool:
        options = self.stream_options or StreamOptions()
        has_counts = options.include_usage and options.continuous_usage_stats
        return self.answers > 1 or self.timings_per_token or self.return_progress or has_counts

    def _request(self, prompt: Prompt, max_new_tokens: int | None, **more: Any) -> CompletionRequest:
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
            raise ParameterError("stream_options", "requires stream: true")


class ChatBody(GenerationBody, ChatFields, foreign=CHAT):
    max_tokens: LimitField = None
    """The maximum number of tokens in an answer. The default, or -1, is as many as fit into the context."""
    max_completion_tokens: LimitField = None
    """The newer name for `max_tokens`."""
    logprobs: bool = False
    """True to show the generated tokens' logprobs in the reply."""
    top_logprobs: int | None = None
    """The number of likeliest tokens to show for each token of the answer, with logprobs. Requires `logprobs`."""

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
            raise ParameterError("top_logprobs", "requires logprobs: true")

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
            self.thoughts(self),
        )


class CompletionBody(GenerationBody, foreign=COMPLETION):
    prompt: PromptsField
    """One prompt (text or token ids), or a list of prompts."""
    suffix: str = ""
    """The text after the gap that the answer fills. The model must support infilling, and the prompts must be texts."""
    max_tokens: LimitField = DEFAULT_COMPLETION_TOKENS
    """The maximum number of tokens in an answer, or -1 for as many as fit into the context. 0 generates no tokens."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """The number of likeliest tokens to show beside each token's own logprob. By default, no logprobs are shown."""
    echo: bool = False
    """True to begin the reply's text with the prompt. With `logprobs`, the prompt's tokens also get logprobs."""
    score_from: Annotated[int, documented(0, MAX_CONTEXT_TOKENS)] | None = None
    """Index of the first prompt token to get a logprob. Requires `echo` and `logprobs`. A higher index saves time."""
    best_of: int | None = None
    """Must be absent or equal to `n`."""
    add_special_tokens: Annotated[bool, Requested("add_special")] = True
    """True to add BOS if the model's tokenizer uses it."""
    parse_special: Annotated[bool, Requested()] = True
    """True to read texts such as `<s>` in the prompt as special tokens."""

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def answers(self) -> int:
        return len(self.prompt) * self.n

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n):
            raise ParameterError("best_of", f"is {shown(self.best_of)}, but must equal n, which is {shown(self.n)}")
        if self.suffix and self.echo:
            raise ParameterError("suffix", "cannot be used together with echo")
        if self.score_from is not None and (not self.echo or self.logprobs is None):
            raise ParameterError("score_from", "requires echo and logprobs")
        if self.answers > MAX_CHOICES:
            prompts = f" to {len(self.prompt)} prompts" if len(self.prompt) > 1 else ""
            raise ParameterError("n", f"requests {shown(self.answers)} answers{prompts}; the limit is {MAX_CHOICES}")

    def requests(self) -> list[CompletionRequest]:
        more = {
            "top_logprobs": self.logprobs or 0,
            "score_from": (self.score_from or 0) if self.echo and self.logprobs is not None else None,
        }
        first = self._request(self.prompt[0], self.max_tokens, **more)
        return [first, *(replace(first, prompt=prompt) for prompt in self.prompt[1:])]
