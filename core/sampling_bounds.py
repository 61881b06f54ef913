"""Bounds of sampling parameters, and the type of a row in the sampling table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum, auto
from typing import Any, Final

MAX_VOCABULARY = 1 << 20
MAX_CONTEXT_TOKENS = 1 << 20  # that a sequence has, and penalties look back at
MAX_TOP_K = (1 << 31) - 1
MAX_PENALTY = 1000.0
MAX_BIAS = 1e9  # added to a logit: a token that is never chosen, or always

MAX_LOGIT_BIASES = 1024
MAX_MU = 1e12
MAX_BREAKERS = 1 << 16  # token sequences of one request that DRY does not look beyond
MAX_BREAKER_TOKENS = 64  # tokens of each
MAX_BREAKERS_TOKENS = 1 << 15  # tokens of all of them: those that matter go to the last stage with every token
MAX_GRAMMAR_BYTES = 1 << 20
MAX_GBNF_WORK = 1 << 25  # rules times characters: the time to convert them, about a second
MAX_TRIGGERS = 64
MAX_TRIGGER_BYTES = 1024
MAX_FORCED_TOKENS = 64  # that one output row may add to the sampled one
MAX_DRAFTED_TOKENS = 32  # that an MTP head adds likewise
MAX_MATCHER_NS = 60_000_000_000  # processor time of a row's matcher; answers are given up long before
MAX_REASONING_END_TOKENS = 1 << 14  # that end reasoning whose budget is used up

_ROW: Final = "row"


class Dialect(Enum):
    OPENAI = auto()  # Anthropic's API too
    LLAMACPP = auto()
    OLLAMA = auto()


@dataclass(frozen=True, slots=True)
class SamplingField:
    """A row of the sampling table, which describes one numeric parameter of a request."""

    low: float
    high: float
    default: float  # of requests that leave it out; if it is a whole number, the field takes no other
    doc: str  # one sentence
    placeholder: str  # of the command-line option
    llamacpp: float  # default in llama.cpp's API
    ollama: float
    llamacpp_name: str  # name in llama.cpp's and Ollama's APIs and of the option; empty: the same
    gguf: str  # key below `general.sampling.` in model files; empty: none

    @property
    def is_whole(self) -> bool:
        return isinstance(self.default, int)

    def name_in(self, dialect: Dialect, name: str) -> str:
        return name if dialect is Dialect.OPENAI else self.llamacpp_name or name

    def default_in(self, dialect: Dialect) -> float:
        return {Dialect.LLAMACPP: self.llamacpp, Dialect.OLLAMA: self.ollama}.get(dialect, self.default)


def number(
    bounds: tuple[float, float],
    default: float,
    doc: str,
    placeholder: str = "X",
    *,
    neutral: float | None = None,
    llamacpp: float | None = None,
    ollama: float | None = None,
    llamacpp_name: str = "",
    gguf: str = "",
) -> Any:
    """Declares a dataclass attribute and its row in the sampling table. The attribute's default is `neutral` if given,
    otherwise `default`. The APIs of llama.cpp and Ollama use `default` unless `llamacpp` or `ollama` is given."""
    own = [default if value is None else value for value in (llamacpp, ollama)]
    row = SamplingField(*bounds, default, doc, placeholder, own[0], own[1], llamacpp_name, gguf)
    return field(default=default if neutral is None else neutral, metadata={_ROW: row})


def rows_of(kind: Any) -> dict[str, SamplingField]:
    return {part.name: part.metadata[_ROW] for part in fields(kind) if _ROW in part.metadata}


def numbers_of(source: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}
