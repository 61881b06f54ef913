"""Matchers: the grammar and the reasoning budget that the last stage applies to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, TypeAlias

from llamaclust.core.bounds import LOCAL, Integer, Size, Text
from llamaclust.core.sampler.bounds import (
    MAX_CONTEXT_TOKENS,
    MAX_GRAMMAR_BYTES,
    MAX_REASONING_END_TOKENS,
    MAX_TRIGGER_BYTES,
    MAX_TRIGGERS,
    MAX_VOCABULARY,
)

if TYPE_CHECKING:  # The import is slow, and clients do not need it.
    import numpy as np
    from numpy.typing import NDArray

AllowedTokens: TypeAlias = "NDArray[np.uint32]"
"""A bit mask [vocabulary / 32, rounded up]: one bit per token, lowest bit first. A set bit allows the token."""

Tags: TypeAlias = tuple[Annotated[str, Text(1, MAX_TRIGGER_BYTES)], ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's JSON. With `triggers`, it constrains the answer only from the first trigger on."""

    definition: Annotated[str, Text(1, MAX_GRAMMAR_BYTES)]
    triggers: Annotated[Tags, Size(0, MAX_TRIGGERS)] = ()
    origin: str = field(default="grammar", compare=False, metadata=LOCAL)  # Field of the request, for error messages.


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Tags around reasoning text. Any of `begins` opens reasoning, and any of `ends` closes it. After `budget` tokens
    of reasoning, the tokens in `forced` are generated to close it."""

    begins: Annotated[Tags, Size(1, MAX_TRIGGERS)]
    ends: Annotated[Tags, Size(1, MAX_TRIGGERS)]
    forced: Annotated[
        tuple[Annotated[int, Integer(0, MAX_VOCABULARY - 1)], ...], Size(0, MAX_REASONING_END_TOKENS)
    ] = ()
    # Maximum number of tokens, or None for no limit.
    budget: Annotated[int, Integer(0, MAX_CONTEXT_TOKENS)] | None = None
    is_open: bool = False  # True if the prompt has opened the reasoning.
    repeats: bool = False  # True if reasoning may also follow content.
    delays_grammar: bool = False  # True if the answer's grammar does not apply to the reasoning.


@dataclass(frozen=True, slots=True)
class MatcherStart:
    """The values from which the last stage creates an answer's matcher."""

    key: int  # Identifies the answer within an epoch.
    grammar: Grammar | None
    tokens: tuple[int, ...] = ()  # The answer's tokens so far.
    reasoning: Reasoning | None = None
    may_force: bool = False  # True if tokens that must follow a sampled token are returned with that token.
    drafts_forced: bool = False  # True if such tokens are returned as a draft, which is then verified.
    owner: int = 0  # Number of the client. Clients share the time in which matchers are made.
