"""`chat`: a conversation on a terminal or through a pipe, one line a turn."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from llamaclust.cli import terminal
from llamaclust.cluster.client.base import TextClient
from llamaclust.cluster.client.types import Options
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.scheduler.requests import Timings
from llamaclust.core.errors import LlamaclustError, UsageError

_HELP = """\
/again      answer the last message anew
/system TEXT  say how to answer; without TEXT, no more
/stats      tokens and speed of the last answer
/save FILE  write the conversation to FILE
/load FILE  go on with the conversation of FILE
/clear      forget the conversation, but not what --system said
/help       this
/exit       leave, as Ctrl-D does
Ctrl-C interrupts an answer. A line that begins with a space is sent as it is."""

_HISTORY_LINES = 1000
_ROLES = ("system", "user", "assistant")


class Chat:
    """A conversation and its commands. What is not part of an answer goes to standard error."""

    def __init__(self, client: TextClient, system: str | None, options: Options) -> None:
        self.messages: list[dict[str, str]] = []
        self._client = client
        self._first = [] if system is None else [{"role": "system", "content": terminal.argument(system)}]
        self._options = options
        self._dropped = 0  # messages behind the system's that no longer fit
        self._timings: Timings | None = None  # of the last answer
        self._is_terminal = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/load": self._load,
            "/clear": lambda rest: self._clear(),
            "/again": lambda rest: self._again(),
            "/system": self._instruct,
            "/stats": lambda rest: self._show_timings(),
            "/help": lambda rest: _tell(_HELP),
        }
        self._clear()

    def run(self) -> None:
        """Until the end of the input or /exit. On a terminal an error ends a turn, else the chat."""
        if self._is_terminal:
            _keep_history()
            _tell("/help shows commands, Ctrl-D leaves")
        for line in self._lines():
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self._take(line)
            except LlamaclustError as error:
                if not self._is_terminal:
                    raise
                terminal.print_error(error)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("> ") if self._is_terminal else _piped_line()
            except EOFError:
                if self._is_terminal:
                    _tell("")
                return
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                _tell("\n/exit or Ctrl-D leaves")

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            self._answer(terminal.argument(line.strip()))
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UsageError(f"unknown command {name}; try /help, or put a space before the line to send it as it is")

    def _answer(self, text: str) -> None:
        """One turn. An answer that is interrupted stays as far as it came; a turn without one is forgotten."""
        self.messages.append({"role": "user", "content": text})
        parts: list[str] = []
        try:
            self._print_answer(parts)
        except KeyboardInterrupt:
            _tell("\n(interrupted)")
        finally:
            if parts:
                self.messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self.messages.pop()

    def _print_answer(self, parts: list[str]) -> None:
        """Without the oldest turns, where all are more than the context holds."""
        while True:
            try:
                with self._client.chat(self._sent(), stream=True, **self._options) as chunks:
                    for chunk in chunks:
                        self._timings = chunk.timings or self._timings
                        if chunk.text:
                            parts.append(chunk.text)
                            terminal.write(chunk.text)
                print()
                return
            except LlamaclustError as error:
                if error.code != "context_length_exceeded" or not self._drop_a_turn():
                    raise

    def _sent(self) -> list[dict[str, str]]:
        first = self._system_messages()
        return self.messages[:first] + self.messages[first + self._dropped :]

    def _system_messages(self) -> int:
        return next((at for at, message in enumerate(self.messages) if message["role"] != "system"), 0)

    def _drop_a_turn(self) -> bool:
        """Whether there was one before the last message."""
        begin = self._system_messages() + self._dropped
        users = (at for at in range(begin + 1, len(self.messages)) if self.messages[at]["role"] == "user")
        end = next(users, None)
        if end is None:
            return False
        if not self._dropped:
            _tell("(longer than the model's context: the oldest turns are left out from here on; /clear begins anew)")
        self._dropped += end - begin
        return True

    def _again(self) -> None:
        turns = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            raise UsageError("/again: nothing has been said yet")
        turn = self.messages[turns[-1] :]
        del self.messages[turns[-1] :]
        try:
            self._answer(turn[0]["content"])
        finally:
            if len(self.messages) == turns[-1]:  # without an answer the old one stays
                self.messages += turn

    def _instruct(self, text: str) -> None:
        del self.messages[: self._system_messages()]
        self._first = [{"role": "system", "content": terminal.argument(text)}] if text else []
        self.messages[:0] = self._first

    def _show_timings(self) -> None:
        if self._timings is None:
            raise UsageError("/stats: there is no answer yet")
        first, prefill, decode = self._timings.ttft_ms, self._timings.prefill_tok_s, self._timings.decode_tok_s
        _tell(f"first token after {first:.0f} ms; prompt {prefill:.0f} tok/s, answer {decode:.1f} tok/s")

    def _clear(self) -> None:
        self.messages, self._dropped = list(self._first), 0

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        try:
            path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise UsageError(f"{path}: cannot save: {error.strerror}") from error
        _tell(f"saved {len(self.messages)} messages to {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        try:
            messages = json.loads(path.read_text("utf-8"))["messages"]
            self.messages, self._dropped = [_message(message) for message in messages], 0
        except OSError as error:
            raise UsageError(f"{path}: cannot load: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}: not a conversation that /save wrote") from error
        _tell(f"loaded {len(self.messages)} messages from {path}")


def _keep_history() -> None:
    """Gives input() keys to edit with, and the lines of earlier chats."""
    with suppress(ImportError, OSError):
        import readline

        path = environment().state_dir / ".chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        readline.set_history_length(_HISTORY_LINES)
        readline.read_history_file(path)
        atexit.register(readline.write_history_file, path)


def _message(value: dict[str, str]) -> dict[str, str]:
    """ValueError, KeyError or TypeError for what is none."""
    role, content = value["role"], value["content"]
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(role)
    return {"role": role, "content": content}


def _path(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"{command} needs the name of a file")
    return Path(name).expanduser()


def _piped_line() -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not {sys.stdin.encoding}: {error.reason}") from error
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
