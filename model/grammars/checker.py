"""Checks grammars before requests are admitted. Checks run in a child process with limits on time and memory."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import OrderedDict
from dataclasses import replace
from hashlib import sha256
from typing import Final

from llamaclust.core.errors import DeadlineError, ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sharing.turns import Turns
from llamaclust.model.grammars.checker_process import CheckerProcess, CheckGuardError, CheckLimits, Verdict
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_PROCESSES: Final = 2
_KEPT_VERDICTS: Final = 256
_KEPT_CHARACTERS: Final = 1 << 16  # Maximum length of a converted definition in the cache.


class GuardedGrammarError(ParameterError):
    """The check of a grammar exceeded its limit of CPU time or memory."""


class GrammarChecker:
    def __init__(self, tokenizer: Tokenizer, limits: CheckLimits | None = None) -> None:
        self._has_end = bool(tokenizer.end_of_generation)
        self._limits = limits or CheckLimits()
        self._processes = [CheckerProcess(tokenizer, self._limits) for _ in range(_PROCESSES)]
        self._turns = Turns(_PROCESSES, most=_PROCESSES - 1)  # Long checks of one owner must not delay other owners.
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()  # The keys are digests, least recently used first.

    async def check(self, grammar: Grammar, owner: str = "") -> Grammar:
        """Checks a grammar and returns it in the form that workers compile. Raises ParameterError if the grammar is
        invalid, and DeadlineError if the machine is too busy."""
        if not self._has_end:
            raise ParameterError(grammar.origin, "the model has no end-of-generation token, which grammars need")
        try:
            verdict = await self._verdict(grammar.definition, owner)
        except CheckGuardError as error:  # This is no verdict, so it is not cached.
            raise GuardedGrammarError(grammar.origin, str(error)) from None
        if verdict.reason:
            raise ParameterError(grammar.origin, verdict.reason)
        return replace(grammar, definition=verdict.definition or grammar.definition)

    async def _verdict(self, definition: str, owner: str) -> Verdict:
        key = sha256(definition.encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        try:
            async with asyncio.timeout(self._limits.wait_s) as waiting, self._turns.turn(owner):
                waiting.reschedule(None)  # The process has its own limits.
                verdict = await self._checked(definition)
        except (TimeoutError, concurrent.futures.CancelledError):
            text = f"the check of grammars was busy with other requests for {self._limits.wait_s:g} s; try again"
            raise DeadlineError(text) from None
        if len(verdict.definition) <= _KEPT_CHARACTERS:
            self._verdicts[key] = verdict
            if len(self._verdicts) > _KEPT_VERDICTS:
                self._verdicts.popitem(last=False)
        return verdict

    async def _checked(self, definition: str) -> Verdict:
        """Checks a grammar. Even if cancelled, waits for the check's end, so that the owner keeps the turn."""
        process = min(self._processes, key=lambda process: process.child.load)
        check = asyncio.wrap_future(process.submit(definition))
        try:
            return await asyncio.shield(check)
        finally:
            await asyncio.wait([check])

    def close(self) -> None:
        for process in self._processes:
            process.child.stop()
        for process in self._processes:
            process.child.close()
