"""Finds endlessly circular references in JSON schemas. llguidance would find them only during an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamaclust.model.grammars.schema_parts import DEFINED, parts
from llamaclust.model.grammars.schema_references import MISSING, SchemaReferences


def endless_reference(schema: Any) -> str | None:
    """Returns the first reference that no finite value can match, or None. Ignores references to other documents."""
    targets = _targets(schema)
    conditions = _Conditions(targets)
    return next((reference for reference in targets if not conditions.ends(reference)), None)


def _targets(schema: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    references, read = SchemaReferences(schema), set[int]()
    pending = [schema]
    while pending:
        for reference in _references(pending.pop(), read):
            target = MISSING if reference in found else references.target(reference)
            if target is not MISSING:
                found[reference] = target
                pending.append(target)
    return found


def _references(schema: Any, read: set[int]) -> Iterator[str]:
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += reversed(part)
        elif isinstance(part, Mapping) and id(part) not in read:
            read.add(id(part))
            if isinstance(reference := part.get("$ref"), str):
                yield reference
            used = {key: value for key, value in part.items() if key == "properties" or key not in DEFINED}
            pending += reversed([*parts(used)])


@dataclass(slots=True, eq=False)
class _Condition:
    """A condition that becomes true when `missing` more of its prerequisites are true. The condition is itself a
    prerequisite of all `users`."""

    missing: int
    users: list[_Condition] = field(default_factory=list)


class _Conditions:
    """Finds the references that a finite value can match (a least fixed point)."""

    def __init__(self, targets: Mapping[str, Any]) -> None:
        self._targets = targets
        self._made: list[_Condition] = []
        self._of_part: dict[int, _Condition] = {}  # The keys are ids, because a part may have many names.
        self._unread: list[Mapping[str, Any]] = []
        for target in targets.values():
            self._of(target)
        while self._unread:
            part = self._unread.pop()
            self._all(self._needed(part)).users.append(self._of_part[id(part)])
        true = [condition for condition in self._made if not condition.missing]
        while true:
            for user in true.pop().users:
                user.missing -= 1
                if not user.missing:
                    true.append(user)

    def ends(self, reference: str) -> bool:
        return self._of(self._targets[reference]).missing <= 0

    def _of(self, schema: Any) -> _Condition:
        if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
            return self._all(())
        if id(schema) not in self._of_part:
            self._of_part[id(schema)] = self._condition(1, ())  # The loop in `__init__` adds prerequisites.
            self._unread.append(schema)
        return self._of_part[id(schema)]

    def _needed(self, schema: Mapping[str, Any]) -> list[_Condition]:
        reference = schema.get("$ref")
        needed = (
            [self._of(self._targets[reference])] if isinstance(reference, str) and reference in self._targets else []
        )
        needed += map(self._of, _list(schema.get("allOf")))
        for key in ("anyOf", "oneOf"):
            if alternatives := _list(schema.get(key)):
                needed.append(self._any([*map(self._of, alternatives)]))
        types = schema.get("type")
        kinds = {types} if isinstance(types, str) else {kind for kind in _list(types) if isinstance(kind, str)}
        if kinds and kinds <= {"object", "array"}:
            ways = {"object": _object_parts, "array": _array_parts}
            needed.append(self._any([self._all([*map(self._of, ways[kind](schema))]) for kind in kinds]))
        return needed

    def _all(self, used: Sequence[_Condition]) -> _Condition:
        return self._condition(len(used), used)

    def _any(self, used: Sequence[_Condition]) -> _Condition:
        return self._condition(1, used)

    def _condition(self, missing: int, used: Sequence[_Condition]) -> _Condition:
        condition = _Condition(missing)
        self._made.append(condition)
        for each in used:
            each.users.append(condition)
        return condition


def _object_parts(schema: Mapping[str, Any]) -> list[Any]:
    named = schema.get("properties")
    named, others = named if isinstance(named, Mapping) else {}, schema.get("additionalProperties")
    return [named.get(name, others) for name in _list(schema.get("required")) if isinstance(name, str)]


def _array_parts(schema: Mapping[str, Any]) -> list[Any]:
    least, first = schema.get("minItems"), _list(schema.get("prefixItems"))
    least = least if isinstance(least, int) else 0
    return [*first[: max(0, least)], *([schema.get("items")] if least > len(first) else ())]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
