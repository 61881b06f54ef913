"""The `chat` command: a session on a terminal or through a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llamaclust.cli import terminal
from llamaclust.cli.chat.answer_screen import AnswerScreen
from llamaclust.cli.chat.entries import Entries, Entry
from llamaclust.cli.chat.inserted_files import with_files
from llamaclust.cli.drafts import accepted_text
from llamaclust.cluster.client.base import ChunkStream
from llamaclust.cluster.client.session import ChatSession, is_conversation
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.values import expand_home
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.sizes import counted

_HELP: Final = '''\
/again        answer the last message again
/undo         remove the last message and its answer
/history      print the conversation
/system TEXT  set the system message; without TEXT, remove it
/stats        show token counts and speed of the last answer
/save FILE    write the conversation to FILE
/load FILE    continue the conversation in FILE
/clear        forget the conversation, but keep the system message
/help, /?     show this help
/exit         leave, like /quit, /bye and Ctrl-D
@FILE         in a message, insert the text or image in FILE; quote a name with spaces: @"MY FILE" (Tab completes)
A line that ends with \\ continues on the next line. """ begins and ends a message of several lines.
Such a message is sent unchanged, and so is a line that begins with a space. Ctrl-C interrupts an answer.'''
_DROPPED: Final = (
    "(the conversation exceeds the model's context, so its oldest turns are no longer sent; /clear starts a new one)"
)
_DROPPED_IMAGES: Final = "(the conversation has too many images for a request, so its oldest images are no longer sent)"
_ALL_REASONING: Final = (
    "(no answer: generation ended within the reasoning, which only a terminal shows; raise -n or set "
    "--reasoning-budget)"
)
_EXITS: Final = ("/exit", "/quit", "/bye")
_HISTORY: Final = ".chat_history"
"""Name of the file, in the state directory, that keeps typed lines."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    is_colored: bool = False
    renders_markdown: bool = False  # Has an effect only on a terminal with colors.
    shows_stats: bool = False  # Prints token counts and speed after each answer.
    takes_commands: bool = False  # Obeys commands and @FILE in piped input. Typed input may always contain them.
    file: Path | None = None  # The conversation is saved to this file after each answer and each command.


class Chat:
    """A chat session and its slash commands. Answers go to standard output, notices to standard error."""

    def __init__(self, session: ChatSession, settings: ChatSettings) -> None:
        self._session = session
        self._settings = settings
        # Timings of the conversation's last answer, or None if this session did not complete that answer.
        self._timings: Timings | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/again": lambda rest: self._show(session.regenerate(stream=True)),
            "/undo": lambda rest: self._undo(),
            "/history": lambda rest: self._print_history(),
            "/system": lambda rest: session.set_system(terminal.argument(rest) or None),
            "/stats": lambda rest: self._print_stats(),
            "/save": self._save,
            "/load": self._load,
            "/clear": lambda rest: self._clear(),
            "/help": lambda rest: _print_notice(_HELP),
            "/?": lambda rest: _print_notice(_HELP),
        }

    def run(self) -> None:
        """Reads and answers entries until /exit or the end of the input. On a terminal, an error ends only the current
        turn. If input is piped, an error ends the chat."""
        is_terminal = sys.stdin.isatty()
        settings = self._settings
        history = environment().state_dir / _HISTORY
        entries = Entries(history, is_colored=settings.is_colored, takes_commands=settings.takes_commands)
        if is_terminal:
            _print_notice("/help shows commands, Ctrl-D leaves")
        while True:
            try:
                entry = entries.read()
                if entry.text in _EXITS and not entry.is_literal:
                    return
                self.take(entry)
            except EOFError:
                if is_terminal:
                    _print_notice("")
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                _print_notice("\n/exit or Ctrl-D leaves")
            except LlamaclustError as error:
                if not is_terminal:
                    raise
                terminal.print_error(error)

    def take(self, entry: Entry) -> None:
        """Answers a message or runs a command. Raises UsageError for an unknown command."""
        name, _, rest = entry.text.partition(" ")
        if not entry.text:
            return
        try:
            self._act(entry, name, rest.strip())
        finally:  # The received part of a failed answer is saved, too.
            if self._settings.file is not None:
                self._session.save(self._settings.file)

    def _act(self, entry: Entry, name: str, rest: str) -> None:
        if entry.is_literal or not name.startswith("/"):
            text = terminal.argument(entry.text)
            self._show(self._session.send(text if entry.is_literal else with_files(text), stream=True))
        elif name in self._commands:
            self._commands[name](rest)
        else:
            raise UsageError(f"unknown command {name}; try /help, or put a space before the line to send it as it is")

    def _show(self, chunks: ChunkStream) -> None:
        self._timings = None
        dropped, images = self._session.dropped_messages, self._session.dropped_images
        screen = AnswerScreen(is_colored=self._settings.is_colored, renders_markdown=self._settings.renders_markdown)
        try:
            with chunks:
                for chunk in chunks:
                    if not dropped and (dropped := self._session.dropped_messages):
                        _print_notice(_DROPPED)
                    if not images and (images := self._session.dropped_images):
                        _print_notice(_DROPPED_IMAGES)
                    self._timings = chunk.timings or self._timings
                    screen.show(chunk)
        except KeyboardInterrupt:
            screen.end()
            _print_notice("(interrupted)")
            return
        except LlamaclustError:
            screen.fail()
            raise
        screen.end()
        if screen.hides_all:
            _print_notice(_ALL_REASONING)
        if self._settings.shows_stats:
            self._print_stats()

    def _undo(self) -> None:
        removed = self._session.undo()
        self._timings = None
        _print_notice(f"took back {counted(len(removed), 'message')}; {len(self._session.messages)} are left")

    def _clear(self) -> None:
        self._session.clear()
        self._timings = None

    def _print_history(self) -> None:
        for message in self._session.messages:
            terminal.write(f"{message['role']}: {_shown(message.get('content'))}\n")

    def _print_stats(self) -> None:
        if self._timings is None:
            raise UsageError("/stats: there are no statistics to show: send a message and wait for the complete answer")
        timings = self._timings
        prompt = (
            f"{timings.prompt_tokens} tokens, {timings.cached_tokens} of them cached, {timings.prefill_tok_s:.0f} tok/s"
        )
        answer = f"{timings.generated_tokens} tokens, {timings.decode_tok_s:.1f} tok/s"
        if timings.drafted_tokens:
            answer += f", {accepted_text(timings.accepted_tokens, timings.drafted_tokens)}"
        _print_notice(f"prompt: {prompt}; first token after {timings.ttft_ms:.0f} ms; answer: {answer}")

    def _save(self, name: str) -> None:
        path = Path(expand_home(_given(name, "/save")))
        if path.is_file() and not is_conversation(path):
            raise UsageError(f"/save: {name} exists and is not a conversation; remove the file, or give another name")
        self._session.save(path)
        _print_notice(f"saved {counted(len(self._session.messages), 'message')} to {name}")

    def _load(self, name: str) -> None:
        self._session.load(_given(name, "/load"))
        self._timings = None
        _print_notice(f"loaded {counted(len(self._session.messages), 'message')} from {name}")


def _given(name: str, command: str) -> str:
    if not name:
        raise UsageError(f"{command} needs the name of a file")
    return name


def _shown(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return json.dumps(content)
    kinds = {"text": lambda part: str(part.get("text")), "image_url": lambda part: "[image]"}
    return "".join(kinds.get(part.get("type"), json.dumps)(part) for part in content)


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr)
