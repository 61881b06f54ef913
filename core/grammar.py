"""Grammars that an answer obeys, and the place of one output row in such an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_GRAMMAR_BYTES = 1 << 20
MAX_TRIGGERS = 64
MAX_TRIGGER_BYTES = 1024
MAX_FORCED_TOKENS = 64
"""Tokens that one output row may add to the sampled one."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """`definition` is llguidance's own form, a JSON object of grammars (model/grammars/definitions.py makes it).

    Without `triggers` the whole answer obeys it. With them the answer is free until its text contains one of these
    texts; the grammar then rules from the trigger's first byte on.
    """

    definition: str
    triggers: tuple[str, ...] = ()
    origin: str = field(default="grammar", compare=False)  # the request's field, for messages


@dataclass(frozen=True, slots=True)
class GrammarStart:
    """What the last stage needs to continue an answer under a grammar: the state is a function of both."""

    grammar: Grammar
    tokens: tuple[int, ...]  # of the answer, so far


@dataclass(frozen=True, slots=True)
class GrammarRow:
    """The grammar of one output row."""

    key: int  # of the answer, within an epoch
    position: int  # tokens of the answer before the one to be sampled
    start: GrammarStart | None = None  # with an answer's first row on a pipeline, and after a release
    may_force: bool = False  # tokens that must follow the sampled one are wanted with it
