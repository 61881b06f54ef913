"""Checks grammars before requests are admitted, in a child process that is bounded in time and memory: a hostile
grammar ends that process at worst."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any, Final

from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.sampling import Grammar
from llamaclust.model.grammars.vocabulary import grammar_word
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
_MAX_REPLY_BYTES: Final = 1 << 16
_KEPT_RESULTS: Final = 256


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """What one check may use. `wait_s`: how long it may wait for others before it."""

    wall_s: float = 5.0
    memory_bytes: int = 1 << 30
    start_s: float = 30.0
    wait_s: float = 30.0


class GrammarChecker:
    """Of one model; the child is started at the first check and lives until `close`."""

    def __init__(self, tokenizer: Tokenizer, limits: CheckLimits | None = None) -> None:
        self._tokenizer = tokenizer
        self._limits = limits or CheckLimits()
        self._child: subprocess.Popen[bytes] | None = None
        self._results: OrderedDict[str, str] = OrderedDict()  # reasons of refusal by definition; "": none
        self._closed = False
        # One thread owns the child for its whole life: Linux kills the child when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")

    async def check(self, grammar: Grammar) -> None:
        """ParameterError for a grammar that cannot be obeyed, with the reason."""
        if not self._tokenizer.end_of_generation:
            raise ParameterError(grammar.origin, "the model has no end-of-generation token, which grammars need")
        reason = self._results.get(grammar.definition)
        if reason is None:
            future = asyncio.wrap_future(self._thread.submit(self._checked, grammar.definition))
            try:
                reason = await asyncio.wait_for(future, self._limits.wait_s)
            except (TimeoutError, concurrent.futures.CancelledError):
                text = f"the check of grammars was busy with others for {self._limits.wait_s:g} s; try again"
                raise DeadlineError(text) from None
        if reason:
            raise ParameterError(grammar.origin, reason)

    def close(self) -> None:
        """Ends the child; checks in progress fail."""
        if self._closed:
            return
        self._closed = True
        if self._child is not None:
            self._child.kill()
        self._thread.submit(self._drop_child)
        self._thread.shutdown(wait=True)

    def _checked(self, definition: str) -> str:
        """The reason for a refusal, or ""."""
        if definition not in self._results:
            reply = None if self._closed else self._reply(definition)
            if reply is None:
                return "the check of the grammar was stopped" if self._closed else self._late()
            self._results[definition] = str(reply["error"])
            if len(self._results) > _KEPT_RESULTS:
                self._results.popitem(last=False)
        return self._results[definition]

    def _late(self) -> str:
        return f"the grammar needs more than {self._limits.wall_s:g} s or too much memory to compile"

    def _reply(self, definition: str) -> Mapping[str, Any] | None:
        """None where the child ended or was late."""
        if self._child is None:
            self._child = self._start()
        reply = self._request({"definition": definition}, self._limits.wall_s)
        if reply is None:
            self._drop_child()
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        child = self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamaclust.model.grammars.checker_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
        tokens = range(self._tokenizer.vocabulary_size)
        words = [grammar_word(self._tokenizer, token).decode("latin-1") for token in tokens]
        first = {"words": words, "ends": sorted(self._tokenizer.end_of_generation), "memory": self._limits.memory_bytes}
        self._request(first, self._limits.start_s)
        return child

    def _request(self, frame: Mapping[str, Any], timeout_s: float) -> Mapping[str, Any] | None:
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

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
