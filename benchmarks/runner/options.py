from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from llamaclust.core.errors import UsageError

_Value = TypeVar("_Value")


def natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,7}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 9999999")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def zero_or_more(text: str) -> float:
    if not 0 <= float(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 to 1000")
    return float(text)


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 to 1")
    return float(text)


def listed(one: Callable[[str], _Value]) -> Callable[[str], tuple[_Value, ...]]:
    return lambda text: tuple(one(part) for part in text.split(","))


def chosen(what: str, choices: Mapping[str, _Value]) -> Callable[[str], _Value]:
    def read(text: str) -> _Value:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{what} {text!r}: choose from {', '.join(choices)}")
        return choices[text]

    return read


def existing(text: str) -> Path:
    if not Path(text).is_file():
        raise UsageError(f"{text}: no such file")
    return Path(text)
