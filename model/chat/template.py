"""Renders chat templates in child processes that have limits on time, memory and text length."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from llamaclust.core.errors import DeadlineError, ModelFileError, RequestError
from llamaclust.model.chat.template_choice import built_in, suggested_template
from llamaclust.model.child_process import (
    BoundedChild,
    ChildEndedError,
    ChildKilledError,
    ChildLateError,
    ChildProgram,
    ChildUnusableError,
)
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_NO_TEMPLATE: Final = (
    "the model has no chat template, and no built-in one fits: choose one with chat_template or --chat-template, or "
    "send the prompt as text to /v1/completions instead"
)
_KEY: Final = "tokenizer.chat_template"
TOOL_USE: Final = "tool_use"
RAG: Final = "rag"
_MAX_REPLY_SHARE: Final = 6
"""The maximum number of bytes that JSON needs for one byte of rendered text."""
_MOST_PROCESSES = 2
"""The number of child processes. A second process lets other chats continue during a slow render."""
_CHILD: Final = "llamaclust.model.chat.template_child"

_log = logging.getLogger(__name__)

Message = Mapping[str, Any]


class TemplateRefusalError(RequestError):
    """The chat template raised an error for the messages of a request."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Limits of rendering a chat. `wait_s` limits the whole call, including the wait for earlier renders."""

    wall_s: float = 15.0
    cpu_seconds: int = 4
    memory_bytes: int = 512 << 20
    max_text_bytes: int = 8 << 20
    start_s: float = 30.0
    wait_s: float = 60.0


class ChatTemplate:
    """A model's chat template and its child processes, which start on first use. Thread-safe."""

    def __init__(
        self,
        source: str | None,
        bos_token: str,
        eos_token: str,
        limits: TemplateLimits | None = None,
        named: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Creates the chat template. If `source` is None, every render raises RequestError. `named` may have other
        templates for chats with tools (TOOL_USE) or documents (RAG)."""
        self.source = source
        self.named = {name: ChatTemplate(text, bos_token, eos_token, limits) for name, text in named.items()}
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._limits = limits or TemplateLimits()
        self._renderers = [_Renderer(source, self._limits) for _ in range(_MOST_PROCESSES)]

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for template in self.named.values():
            template.close()
        for renderer in self._renderers:
            renderer.child.stop()
        for renderer in self._renderers:
            renderer.child.close()

    def variant(self, *, uses_tools: bool, has_documents: bool) -> ChatTemplate:
        names = [name for name, is_needed in ((TOOL_USE, uses_tools), (RAG, has_documents)) if is_needed]
        return next((self.named[name] for name in names if name in self.named), self)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any) -> str:
        """Returns the rendered prompt. `extra` has the template's variables (`tools`, `documents`, ...) and `now_s`,
        the Unix time that the template sees. Raises TemplateRefusalError if the template refuses the messages,
        DeadlineError if rendering is too slow or is stopped, and RequestError if it fails otherwise."""
        future = self._submit(messages, add_generation_prompt, extra)
        try:
            return future.result(self._limits.wait_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise self._waited_too_long() from None

    async def render_async(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any) -> str:
        future = asyncio.wrap_future(self._submit(messages, add_generation_prompt, extra))
        try:
            return await asyncio.wait_for(future, self._limits.wait_s)
        except TimeoutError:
            raise self._waited_too_long() from None

    def _submit(
        self, messages: Sequence[Message], add_generation_prompt: bool, extra: Mapping[str, Any]
    ) -> Future[str]:
        if self.source is None:
            raise RequestError(_NO_TEMPLATE)
        variables = {"tools": None, "documents": None, **self._tokens, **extra}
        variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return min(self._renderers, key=lambda renderer: renderer.child.load).submit(variables)

    def _waited_too_long(self) -> DeadlineError:
        return DeadlineError(f"the chat template was busy with other requests for {self._limits.wait_s:g} s; try again")


class _Renderer:
    def __init__(self, source: str | None, limits: TemplateLimits) -> None:
        first = {"source": source, **asdict(limits)}
        max_line_bytes = limits.max_text_bytes * _MAX_REPLY_SHARE + (1 << 16)
        program = ChildProgram(_CHILD, lambda: first, limits.start_s, limits.wall_s, max_line_bytes)
        self.child = BoundedChild(program, "chat-template")
        self._broken: str | None = None
        self._is_reported = False

    def submit(self, variables: Mapping[str, Any]) -> Future[str]:
        return self.child.submit(partial(self._render, variables))

    def _render(self, variables: Mapping[str, Any]) -> str:
        if self._broken is not None:
            raise RequestError(self._broken)
        try:
            reply = self.child.request(variables)
        except RecursionError:
            raise RequestError("the messages are nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise RequestError(f"the messages cannot be written as JSON: {error}") from error
        except ChildUnusableError as failure:  # It does not compile, or exceeds a limit. A retry is useless.
            self._broken = f"the model's chat template cannot be used: {_line(failure)}"
            raise RequestError(self._broken) from None
        except (ChildKilledError, ChildLateError) as failure:
            raise DeadlineError(f"the model's chat template was stopped: {failure}; try again") from None
        except ChildEndedError as failure:
            raise RequestError(f"the model's chat template was stopped: {failure}") from None
        self._report(self.child.first_reply["unconfined"])
        if "error" in reply:
            raise TemplateRefusalError(f"the model's chat template: {_line(reply['error'])}")
        return str(reply["text"])

    def _report(self, unconfined: str | None) -> None:
        if unconfined is not None and not self._is_reported:
            self._is_reported = True
            _log.warning("chat templates are rendered with Jinja's sandbox alone: %s", unconfined)


def load_chat_template(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, limits: TemplateLimits | None = None, chosen: str | None = None
) -> ChatTemplate:
    """Returns the user's chat template `chosen`. If it is None, returns the model file's template or, if the file has
    none, a built-in template that fits. Raises ModelFileError if the file's template is not text."""
    source = _source(metadata, _KEY)
    found = {name: _source(metadata, f"{_KEY}.{name}") for name in (TOOL_USE, RAG)}
    named = {name: text for name, text in found.items() if text} if chosen is None else {}
    if chosen is not None:
        source = chosen
    elif not source:
        name = suggested_template(metadata, tokenizer)
        source = None if name is None else built_in(name)
    return ChatTemplate(source, _text(tokenizer, tokenizer.bos_id), _text(tokenizer, tokenizer.eos_id), limits, named)


def _source(metadata: Mapping[str, Any], key: str) -> str | None:
    source = metadata.get(key)
    if source is not None and not isinstance(source, str):
        raise ModelFileError(f"{key} is not text")
    return source


def _line(text: object) -> str:
    return "".join(character for character in " ".join(str(text).split()) if character.isprintable())


def _text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id)
