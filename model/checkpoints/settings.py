"""Reads the settings in a JSON object and checks their ranges. Errors name the missing or invalid key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown

MAX_WIDTH: Final = 1 << 20
_MAX_REAL: Final = 1e12


@dataclass(frozen=True, slots=True)
class Settings:
    """Typed values of a JSON object. Methods use the first of the given names that exists. Errors name `origin`."""

    values: Mapping[str, Any]
    origin: str

    def error(self, name: str, what: str) -> ModelFileError:
        return ModelFileError(f"{self.origin}: {shown(name)}: {what}")

    def shown(self, name: str) -> str:
        return _shown(self.values.get(name))

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def count(self, *names: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_WIDTH) -> int:
        value = self._find(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(names[0], f"expected a whole number of {minimum} to {maximum}, found {_shown(value)}")
        return value

    def real(
        self, *names: str, default: float | None = None, minimum: float = 0.0, maximum: float = _MAX_REAL
    ) -> float:
        value = self._find(names, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(names[0], f"expected a number, found {_shown(value)}")
        if not minimum <= value <= maximum:  # NaN fails this comparison too.
            raise self.error(names[0], f"expected {minimum:g} to {maximum:g}, found {_shown(value)}")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        value = self._find(names, default)
        if not isinstance(value, bool):
            raise self.error(names[0], f"expected true or false, found {_shown(value)}")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        value = self._find(names, default)
        if not isinstance(value, str):
            raise self.error(names[0], f"expected text, found {_shown(value)}")
        return value

    def reals(self, name: str, count: int) -> list[float]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != count:
            there = f"{len(value)} entries" if isinstance(value, list) else _shown(value)
            raise self.error(name, f"expected {count} numbers, found {there}")
        if not all(isinstance(number, int | float) and 0 < number <= _MAX_REAL for number in value):
            raise self.error(name, "expected positive numbers only")
        return [float(number) for number in value]

    def inner(self, *names: str) -> Settings:
        value = self._find(names, {})
        if not isinstance(value, dict):
            raise self.error(names[0], f"expected an object, found {_shown(value)}")
        return Settings(value, f"{self.origin}: {shown(names[0])}")

    def _find(self, names: tuple[str, ...], default: Any) -> Any:
        found = next((self.values[name] for name in names if self.has(name)), default)
        if found is None:
            raise self.error(names[0], "missing")
        return found


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, str) else str(value)[:64]
