"""Chat templates of model files, rendered in a child process that is bounded in time, memory and length of its text."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import Event, Timer
from typing import Any, Final

from llamaclust.core.errors import DeadlineError, ModelFileError, RequestError
from llamaclust.model.chat.template_choice import built_in, suggested_template
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_NO_TEMPLATE: Final = (
    "the model carries no chat template, and its name tells none: choose one with chat_template or --chat-template, or "
    "send the prompt as text to /v1/completions instead"
)
_MAX_REPLY_SHARE: Final = 6
"""JSON may write one byte of text as six."""
_MOST_PROCESSES = 2
"""So that a template which takes long does not hold up all chats."""
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""Variables for Python's start and for dates in templates; keys and tokens are not passed."""
_OTHERS_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
_END_S = 1.0
"""Deadline from the child's last byte to its exit."""

_log = logging.getLogger(__name__)

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one render may use. `wait_s` is how long a render may wait for others before it."""

    wall_s: float = 15.0
    cpu_seconds: int = 4
    memory_bytes: int = 512 << 20
    max_text_bytes: int = 8 << 20
    start_s: float = 30.0
    wait_s: float = 60.0


class ChatTemplate:
    """A model's chat template and the processes that render it, started at the first render, further ones where several
    renders wait. Safe for many threads."""

    def __init__(
        self, source: str | None, bos_token: str, eos_token: str, limits: TemplateLimits | None = None
    ) -> None:
        """`source` is None for a model without a template: every render is refused then."""
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._limits = limits or TemplateLimits()
        self._is_closed = False
        self._renderers = [_Renderer(source, self._limits) for _ in range(_MOST_PROCESSES)]

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child processes; renders in progress and those that wait fail. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        for renderer in self._renderers:
            renderer.stop()
        for renderer in self._renderers:
            renderer.close()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt for some messages; `extra` are more variables of the template (`tools`, `documents`, ...), and
        `now_s` the Unix time that it sees, the present where that is missing.

        RequestError where there is no template, it refuses the messages, fails, or uses more than its limits, always
        the same for the same messages; DeadlineError where it had to wait too long for other renders, took too long by
        the clock, was killed by others or closed.
        """
        future = self._submit(messages, add_generation_prompt, extra)
        try:
            return future.result(self._limits.wait_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise self._waited_too_long() from None

    async def render_async(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any) -> str:
        """As `render`, without blocking the event loop."""
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
        return min(self._renderers, key=lambda renderer: renderer.load).submit(variables)

    def _waited_too_long(self) -> DeadlineError:
        return DeadlineError(f"the chat template was busy with other requests for {self._limits.wait_s:g} s; try again")


class _Renderer:
    """A child process, and the thread that owns it for its whole life: Linux kills a child when the thread that started
    it ends."""

    def __init__(self, source: str | None, limits: TemplateLimits) -> None:
        self.child: _TemplateProcess | None = None
        self._source = source
        self._limits = limits
        self._broken: str | None = None
        self._is_stopped = False
        self._is_reported = False
        self._renders: set[Future[str]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-template")

    @property
    def load(self) -> int:
        """Renders in progress, and those that wait."""
        return len(self._renders)

    def submit(self, variables: Mapping[str, Any]) -> Future[str]:
        render = self._thread.submit(self._render, variables)
        self._renders.add(render)
        render.add_done_callback(self._renders.discard)
        return render

    def stop(self) -> None:
        """Renders fail from now on."""
        self._is_stopped = True
        child = self.child
        if child is not None:
            child.stop()

    def close(self) -> None:
        """After `stop`: returns when the child is gone."""
        self._thread.submit(self._drop_child)
        self._thread.shutdown(wait=True)

    def _render(self, variables: Mapping[str, Any]) -> str:
        """On the child's thread: large messages take long to write."""
        try:
            frame = _frame(variables)
        except RecursionError:
            raise RequestError("the messages are nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise RequestError(f"the messages cannot be written as JSON: {error}") from error
        try:
            try:
                reply = self._request(frame)
            except _ProcessKilled:  # by others, at work or before
                reply = self._request(frame)
        except (_ProcessKilled, _NotInTime) as failure:
            raise DeadlineError(f"the model's chat template was stopped: {failure}; try again") from None
        except _RenderingStopped as failure:
            raise RequestError(f"the model's chat template was stopped: {failure}") from None
        if "error" in reply:
            raise RequestError(f"the model's chat template: {_line(reply['error'])}")
        return str(reply["text"])

    def _request(self, frame: bytes) -> dict[str, Any]:
        if self._is_stopped:
            raise DeadlineError("the chat template was closed")
        if self._broken is not None:
            raise RequestError(self._broken)
        if self.child is None:
            self.child = self._start()
        try:
            return self.child.request(frame, self._limits.wall_s)
        except _RenderingStopped:
            self._drop_child()
            raise

    def _start(self) -> _TemplateProcess:
        """A child that has compiled the template. A template that does not compile, or not with what it may use, is
        remembered, not tried again."""
        limits = self._limits
        child = _TemplateProcess(limits.max_text_bytes * _MAX_REPLY_SHARE + (1 << 16))
        try:
            reply = child.request(_frame({"source": self._source, **asdict(limits)}), limits.start_s)
            problem = reply.get("error")
        except (_ProcessKilled, _NotInTime):
            child.kill()
            raise
        except _RenderingStopped as failure:
            problem = str(failure)
        else:
            self._report(reply["unconfined"])
        if problem is not None:
            child.kill()
            self._broken = f"the model's chat template cannot be used: {_line(problem)}"
            raise RequestError(self._broken)
        return child

    def _report(self, unconfined: str | None) -> None:
        """Once: a child may be started again and again."""
        if unconfined is not None and not self._is_reported:
            self._is_reported = True
            _log.warning("chat templates are rendered with Jinja's sandbox alone: %s", unconfined)

    def _drop_child(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child = None


class _RenderingStopped(Exception):
    """The child ended, or did not answer in time; the message says how."""


class _ProcessKilled(_RenderingStopped):
    """The child was killed from outside, not by a template."""


class _NotInTime(_RenderingStopped):
    """No reply within the deadline: a slow template or a stalled machine."""


class _TemplateProcess:
    """The rendering process and its two pipes."""

    def __init__(self, max_reply_bytes: int) -> None:
        self._max_reply_bytes = max_reply_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamaclust.model.chat.template_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, frame: bytes, timeout_s: float) -> dict[str, Any]:
        """Sends a request, one line of JSON, and waits for the reply, another one."""
        is_late = Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = Timer(timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            self._input.write(frame)
            self._input.flush()
            line = self._output.readline(self._max_reply_bytes + 1)
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            reply: dict[str, Any] = json.loads(line)
            return reply
        if is_late.is_set():
            raise _NotInTime(f"it did not end within {timeout_s:g} s")
        if len(line) > self._max_reply_bytes:
            raise _RenderingStopped(f"a reply of more than {self._max_reply_bytes} bytes")
        raise self._ending()

    def stop(self) -> None:
        """Makes the process end; may be called from any thread."""
        self._process.kill()

    def kill(self) -> None:
        """Ends the process and its pipes."""
        self._process.kill()
        self._process.communicate()

    def _ending(self) -> _RenderingStopped:
        """How the child ended, which has closed its pipes."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return _RenderingStopped("its process does not answer")
        if -code in _OTHERS_SIGNALS:
            return _ProcessKilled(f"its process was killed by {signal.Signals(-code).name}")
        if code == -signal.SIGXCPU:
            return _RenderingStopped("it used more CPU time than a template may")
        return _RenderingStopped("it crashed the process that rendered it")


def load_chat_template(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, limits: TemplateLimits | None = None, chosen: str | None = None
) -> ChatTemplate:
    """The template of a GGUF file, in its place the text that a user chose, without one that which vocabulary or name
    suggest.

    ModelFileError where the field is not text. A model without a template refuses each render.
    """
    source = metadata.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise ModelFileError("tokenizer.chat_template is not text")
    if chosen is not None:
        source = chosen
    elif not source:
        name = suggested_template(metadata, tokenizer)
        source = None if name is None else built_in(name)
    return ChatTemplate(source, _text(tokenizer, tokenizer.bos_id), _text(tokenizer, tokenizer.eos_id), limits)


def _frame(values: Mapping[str, Any]) -> bytes:
    """One line of JSON in plain ASCII. TypeError, ValueError or RecursionError for values that JSON cannot hold."""
    return json.dumps(values).encode() + b"\n"


def _line(text: object) -> str:
    """What a template says, safe in any terminal and log."""
    return "".join(character for character in " ".join(str(text).split()) if character.isprintable())


def _text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id)
