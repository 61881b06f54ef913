from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from llamaclust.core.errors import DeadlineError, RequestError
from llamaclust.model.child_process import (
    BoundedChild,
    ChildEndedError,
    ChildKilledError,
    ChildLateError,
    ChildProgram,
    ChildUnusableError,
)
from llamaclust.model.grammars.vocabulary import grammar_words
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_CHILD: Final = "llamaclust.model.grammars.checker_child"
_MAX_LINE_BYTES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """Limits of a grammar check. `guard_cpu_s` and `memory_bytes` limit the check's work. `start_s`, `wall_s` and
    `wait_s` limit delays on a slow machine."""

    guard_cpu_s: float = 20.0
    memory_bytes: int = 1 << 30
    wall_s: float = 100.0
    start_s: float = 100.0
    wait_s: float = 100.0


class CheckGuardError(RequestError):
    """The process that checked a grammar has ended, because the check exceeded a limit."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a grammar check: the reason for refusing the grammar (or ""), and its converted form (or "")."""

    reason: str
    definition: str = ""


class CheckerProcess:
    def __init__(self, tokenizer: Tokenizer, limits: CheckLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        program = ChildProgram(_CHILD, self._first, limits.start_s, limits.wall_s, _MAX_LINE_BYTES)
        self.child = BoundedChild(program, "grammar-check")

    def submit(self, definition: str) -> Future[Verdict]:
        """Checks a grammar. The future raises CheckGuardError at a limit, or DeadlineError on a slow machine."""
        return self.child.submit(partial(self._checked, definition))

    def _checked(self, definition: str) -> Verdict:
        try:
            reply = self.child.request({"definition": definition})
        except (ChildKilledError, ChildLateError, ChildUnusableError) as failure:
            raise DeadlineError(f"the check of the grammar was stopped: {failure}; try again") from None
        except ChildEndedError:
            most = f"{self._limits.guard_cpu_s:g} s of CPU time and {self._limits.memory_bytes >> 20} MiB"
            raise CheckGuardError(f"the grammar needs more than {most} to compile; make it smaller") from None
        return Verdict(reply["error"], reply["definition"])

    def _first(self) -> dict[str, Any]:
        return {
            "words": [word.decode("latin-1") for word in grammar_words(self._tokenizer)],
            "ends": sorted(self._tokenizer.end_of_generation),
            "memory": self._limits.memory_bytes,
            "guard_cpu_s": self._limits.guard_cpu_s,
        }
