"""The row type of the sampling table. A row has a numeric parameter's bounds, defaults by API, and names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum, auto
from typing import Any, Final

_ROW: Final = "row"


class Dialect(Enum):
    OPENAI = auto()  # Used for Anthropic's API too.
    LLAMACPP = auto()
    OLLAMA = auto()


@dataclass(frozen=True, slots=True)
class SamplingField:
    """A row of the sampling table, which describes one numeric parameter of a request."""

    low: float
    high: float
    default: float  # Value if a request omits the parameter. If it is an int, only ints are accepted.
    doc: str  # One sentence that explains the parameter to users.
    placeholder: str  # Placeholder in the help of the command-line option.
    llamacpp: float  # Default in llama.cpp's API.
    ollama: float
    llamacpp_name: str  # Name of the option and in the APIs of llama.cpp and Ollama. "": the same name.
    gguf: str  # Key after `general.sampling.` in model files, or "" if there is none.

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
    otherwise `default`. `llamacpp` and `ollama` replace `default` in the APIs of llama.cpp and Ollama."""
    own = [default if value is None else value for value in (llamacpp, ollama)]
    row = SamplingField(*bounds, default, doc, placeholder, own[0], own[1], llamacpp_name, gguf)
    return field(default=default if neutral is None else neutral, metadata={_ROW: row})


def rows_of(kind: Any) -> dict[str, SamplingField]:
    return {part.name: part.metadata[_ROW] for part in fields(kind) if _ROW in part.metadata}


def numbers_of(source: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}
