"""A chat as one request: what every API makes of its body, and the prompt that the model's template makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.threads import TOKENIZING, run_on
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.prompt import guard_messages
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt", "tools"})

Variables = Mapping[str, Any]


class PromptEnd(Enum):
    """What a rendered chat ends with."""

    GENERATION_PROMPT = auto()  # the beginning of a new answer
    LAST_MESSAGE = auto()  # the text of the last message, without its end: the answer continues it
    NOTHING = auto()  # the end of the last message


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat and how it is answered."""

    messages: tuple[Variables, ...]  # as chat templates know them: role, content, ...
    answer: CompletionRequest = field(default_factory=lambda: CompletionRequest(()))  # its prompt is the rendered chat
    tools: tuple[Variables, ...] = ()  # OpenAI's definitions; the template writes them
    variables: Variables = field(default_factory=dict)  # further ones of the template
    end: PromptEnd = PromptEnd.GENERATION_PROMPT

    @property
    def characters(self) -> int:
        """Of all contents: the prompt has at least as many."""
        contents = (message.get("content") for message in self.messages)
        return sum(len(content) for content in contents if isinstance(content, str))


def prompt_end(
    roles: Sequence[str], continue_final_message: bool | None, add_generation_prompt: bool | None
) -> PromptEnd:
    """By the roles of the messages and the fields of vLLM and Transformers. Without `continue_final_message` as
    llama.cpp: a last message of an assistant is continued unless a generation prompt is requested. ParameterError
    where they contradict each other."""
    is_answered = roles[-1:] == ["assistant"]
    if continue_final_message is None:
        continue_final_message = is_answered and not add_generation_prompt
        if continue_final_message and roles[-2:-1] == ["assistant"]:
            reason = "two messages of role assistant at the end: only one can be continued"
            raise ParameterError("messages", reason)
    elif continue_final_message and add_generation_prompt:
        raise ParameterError("continue_final_message", "excludes add_generation_prompt: true; set one of them")
    if continue_final_message:
        if not is_answered:
            raise ParameterError("continue_final_message", "needs a last message of role assistant")
        return PromptEnd.LAST_MESSAGE
    return PromptEnd.NOTHING if add_generation_prompt is False else PromptEnd.GENERATION_PROMPT


async def render(chat: ChatRequest, template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """The prompt's text, guarded (`model.chat.prompt`). RequestError where the template refuses the messages."""
    taken = _TEMPLATE_ARGUMENTS & chat.variables.keys()
    if taken:
        raise ParameterError("chat_template_kwargs", f"{min(taken)!r} cannot be set here")
    variables = {**chat.variables, "tools": [*chat.tools] or None}
    *messages, more = await run_on(TOKENIZING, guard_messages, [*chat.messages, variables], tokenizer)
    if chat.end is not PromptEnd.LAST_MESSAGE:
        is_open = chat.end is PromptEnd.GENERATION_PROMPT
        return await template.render_async(messages, add_generation_prompt=is_open, **more)
    *before, last = messages
    return await template.render_async(before, add_generation_prompt=True, **more) + str(last.get("content") or "")
