"""One child process that checks grammars, and the thread that owns it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any, Final

from llamaclust.core.errors import DeadlineError
from llamaclust.model.grammars.vocabulary import grammar_word
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
_MAX_REPLY_BYTES: Final = 1 << 24
_TRIES: Final = 2
_END_S: Final = 5.0
_ENDED_BY_OTHERS: Final = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """What one check may use: `compile_cpu_s` and `convert_cpu_s` (from GBNF) of a processor decide about a grammar;
    `wall_s`, `start_s` and `wait_s` (for others before it) only about the machine."""

    compile_cpu_s: float = 0.5
    convert_cpu_s: float = 2.0
    memory_bytes: int = 1 << 30
    wall_s: float = 10.0
    start_s: float = 30.0
    wait_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a grammar is refused ("": it is taken), or its definition as workers compile it."""

    reason: str
    definition: str = ""


class CheckerProcess:
    """The child is started at the first check and lives until `close`."""

    def __init__(self, tokenizer: Tokenizer, limits: CheckLimits) -> None:
        self.waiting = 0  # checks that have not ended
        self._tokenizer = tokenizer
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        # One thread owns the child for its whole life: Linux kills the child when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")

    async def check(self, definition: str) -> Verdict:
        """DeadlineError where the machine, not the grammar, is too slow."""
        self.waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._checked, definition))
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Ends the child; checks in progress fail."""
        if self._closed:
            return
        self._closed = True
        if self._child is not None:
            self._child.kill()
        self._thread.submit(self._drop_child)
        self._thread.shutdown(wait=True)

    def _checked(self, definition: str) -> Verdict:
        for _ in range(_TRIES):
            if self._closed:
                break
            if self._child is None and not self._start():
                continue
            reply = self._request({"definition": definition}, self._limits.wall_s)
            if reply is not None:
                return Verdict(reply["error"], reply["definition"])
            if self._drop_child() not in _ENDED_BY_OTHERS:
                needs = f"more than {self._limits.compile_cpu_s:g} s of a processor or too much memory"
                return Verdict(f"the grammar needs {needs} to compile")
        text = "was stopped" if self._closed else f"did not end within {self._limits.wall_s:g} s; try again"
        raise DeadlineError(f"the check of the grammar {text}")

    def _start(self) -> bool:
        """Whether the child is there."""
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamaclust.model.grammars.checker_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
        tokens = range(self._tokenizer.vocabulary_size)
        words = [grammar_word(self._tokenizer, token).decode("latin-1") for token in tokens]
        first = {
            "words": words,
            "ends": sorted(self._tokenizer.end_of_generation),
            "memory": self._limits.memory_bytes,
            "compile_cpu_s": self._limits.compile_cpu_s,
            "convert_cpu_s": self._limits.convert_cpu_s,
        }
        if self._request(first, self._limits.start_s) is None:
            self._drop_child()
        return self._child is not None

    def _request(self, frame: Mapping[str, Any], timeout_s: float) -> Mapping[str, Any] | None:
        """None where the child ended or was late, which ends it."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        timer = Timer(timeout_s, child.kill)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(frame).encode() + b"\n")
                child.stdin.flush()
                line = child.stdout.readline(_MAX_REPLY_BYTES)
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith(b"\n") else None

    def _drop_child(self) -> int:
        """How the child ended."""
        child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin is not None and child.stdout is not None
        child.stdout.close()
        with suppress(BrokenPipeError):
            child.stdin.close()
        try:
            return child.wait(_END_S)  # it has closed its output, or was killed
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()
