"""One child process that checks grammars."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from llamaclust.core.errors import DeadlineError
from llamaclust.model.child_process import (
    BoundedChild,
    ChildEndedError,
    ChildKilledError,
    ChildLateError,
    ChildProgram,
    ChildUnusableError,
)
from llamaclust.model.grammars.vocabulary import grammar_word
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_CHILD: Final = "llamaclust.model.grammars.checker_child"
_MAX_REPLY_BYTES: Final = 1 << 24


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
        self._tokenizer = tokenizer
        self._limits = limits
        program = ChildProgram(_CHILD, self._first, limits.start_s, limits.wall_s, _MAX_REPLY_BYTES)
        self.child = BoundedChild(program, "grammar-check")

    def submit(self, definition: str) -> Future[Verdict]:
        """DeadlineError where the machine, not the grammar, is too slow."""
        return self.child.submit(partial(self._checked, definition))

    def _checked(self, definition: str) -> Verdict:
        try:
            reply = self.child.request({"definition": definition})
        except (ChildKilledError, ChildLateError, ChildUnusableError) as failure:
            raise DeadlineError(f"the check of the grammar was stopped: {failure}; try again") from None
        except ChildEndedError:
            needs = f"more than {self._limits.compile_cpu_s:g} s of a processor or too much memory"
            return Verdict(f"the grammar needs {needs} to compile")
        return Verdict(reply["error"], reply["definition"])

    def _first(self) -> dict[str, Any]:
        tokens = range(self._tokenizer.vocabulary_size)
        return {
            "words": [grammar_word(self._tokenizer, token).decode("latin-1") for token in tokens],
            "ends": sorted(self._tokenizer.end_of_generation),
            "memory": self._limits.memory_bytes,
            "compile_cpu_s": self._limits.compile_cpu_s,
            "convert_cpu_s": self._limits.convert_cpu_s,
        }
