"""References within a JSON schema, by pointer, anchor or identifier."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final
from urllib.parse import unquote

from llamaclust.model.grammars.schema_parts import parts

_IDS: Final = ("$id", "id")
MISSING: Final = object()


class SchemaReferences:
    """Resolves references within a schema. Never downloads a schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._found: dict[str, Any] = {}  # For each reference, the schema at the end of its chain.

    def find(self, reference: str) -> Any:
        """Returns the schema at the end of a chain of references, or MISSING if the chain is broken or circular."""
        chain: dict[str, None] = {}
        while reference not in self._found and reference not in chain:
            chain[reference] = None
            target = self.target(reference)
            following = target.get("$ref") if isinstance(target, Mapping) and len(target) == 1 else None
            if isinstance(following, str):
                reference = following
            else:
                self._found[reference] = target
        found = self._found.get(reference, MISSING)
        self._found.update(dict.fromkeys(chain, found))
        return found

    def target(self, reference: str) -> Any:
        """Returns the schema that a reference names, or MISSING. This schema may be a reference too."""
        resource, _, fragment = reference.partition("#")
        base = self._root if not resource else self._identified.get(resource, MISSING)
        if not fragment or base is MISSING:
            return base
        if not fragment.startswith("/"):
            return self._identified.get(f"#{fragment}", MISSING)
        for part in unquote(fragment[1:]).split("/"):
            base = _member(base, part.replace("~1", "/").replace("~0", "~"))
        return base

    @cached_property
    def _identified(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        waiting = [self._root]
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, Mapping):
                keys = [schema.get(name) for name in _IDS]
                anchor = schema.get("$anchor")
                for key in (*keys, f"#{anchor}" if isinstance(anchor, str) else None):
                    if isinstance(key, str):
                        found.setdefault(key if key.startswith("#") else key.rstrip("#"), schema)
                waiting += parts(schema)
            elif isinstance(schema, list):
                waiting += schema
        return found


def _member(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name, MISSING)
    if isinstance(value, list) and name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(value):
        return value[int(name)]
    return MISSING
