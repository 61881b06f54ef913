"""Checks that the compiled module has everything that its stub declares, because an outdated build would fail later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from llamaclust.core.errors import LlamaclustError

_DEFINITION = re.compile(
    r"^(?P<within> {4})?(?P<kind>def|class) (?P<name>[A-Za-z]\w*)|^ {4}(?P<attribute>[A-Za-z]\w*): ", re.MULTILINE
)
_MOST_TOLD = 3


def check_interface(module: ModuleType, stub: Path) -> None:
    """Raises LlamaclustError if functions, classes or methods are missing. Accepts the module if there is no stub."""
    if not stub.is_file():
        return
    if missing := [*_missing(module, stub.read_text())]:
        more = f" and {len(missing) - _MOST_TOLD} more" if len(missing) > _MOST_TOLD else ""
        what = f"it lacks {', '.join(missing[:_MOST_TOLD])}{more}"
        raise LlamaclustError(
            f"{module.__file__} was built from another version of llamaclust: {what}; build or install it again"
        )


def _missing(module: ModuleType, stub: str) -> Iterator[str]:
    holder: object = module
    for found in _DEFINITION.finditer(stub):
        name = found["name"] or found["attribute"]
        if found["kind"] is not None and found["within"] is None:
            holder = getattr(module, name, None) if found["kind"] == "class" else None
            if not hasattr(module, name):
                yield name
        elif isinstance(holder, type) and not issubclass(holder, Exception) and not hasattr(holder, name):
            yield f"{holder.__name__}.{name}"
