"""References of JSON schemas that lead back to themselves on every way: no finite text obeys them, and llguidance finds
that only when an answer has come to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llamaclust.model.grammars.schema_parts import DEFINED, parts
from llamaclust.model.grammars.schema_references import MISSING, SchemaReferences


def endless_reference(schema: Any) -> str | None:
    """The first reference in use that no finite value obeys. Those to other documents are not followed."""
    targets = _targets(schema)
    ending = _ending(targets)
    return next((reference for reference in targets if reference not in ending), None)


def property_names(schema: Any) -> Iterator[str]:
    """Of all objects in a schema, in its order."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            named = part.get("properties")
            yield from filter(lambda name: isinstance(name, str), named if isinstance(named, Mapping) else ())
            pending += reversed([*parts(part)])
        elif isinstance(part, list):
            pending += reversed(part)


def _targets(schema: Any) -> dict[str, Any]:
    """What each reference in use stands for, in the order in which they are met."""
    found: dict[str, Any] = {}
    references = SchemaReferences(schema)
    pending = [schema]
    while pending:
        for reference in _references(pending.pop()):
            target = MISSING if reference in found else references.target(reference)
            if target is not MISSING:
                found[reference] = target
                pending.append(target)
    return found


def _references(schema: Any) -> Iterator[str]:
    """Those in a schema itself; definitions count where they are referred to."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += reversed(part)
        elif isinstance(part, Mapping):
            if isinstance(reference := part.get("$ref"), str):
                yield reference
            used = {key: value for key, value in part.items() if key == "properties" or key not in DEFINED}
            pending += reversed([*parts(used)])


def _ending(targets: Mapping[str, Any]) -> set[str]:
    """The references that some finite value obeys: the least set that agrees with itself."""
    ending: set[str] = set()
    users: defaultdict[str, set[str]] = defaultdict(set)  # those to look at again when a reference ends
    pending = [*targets]
    while pending:
        reference = pending.pop()
        if reference in ending:
            continue

        def ends(used: str, user: str = reference) -> bool:
            users[used].add(user)
            return used in ending or used not in targets

        if _ends(targets[reference], ends):
            ending.add(reference)
            pending += users[reference]
    return ending


def _ends(schema: Any, ends: Callable[[str], bool]) -> bool:
    """Whether a schema has a finite value, as far as references decide; `ends` says it of these."""
    if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and not ends(reference):
        return False
    if not all(_ends(part, ends) for part in _list(schema.get("allOf"))):
        return False
    for key in ("anyOf", "oneOf"):
        if (parts := _list(schema.get(key))) and not any(_ends(part, ends) for part in parts):
            return False
    types = schema.get("type")
    kinds = {types} if isinstance(types, str) else {kind for kind in _list(types) if isinstance(kind, str)}
    if not kinds or not kinds <= {"object", "array"}:
        return True
    return ("object" in kinds and _object_ends(schema, ends)) or ("array" in kinds and _array_ends(schema, ends))


def _object_ends(schema: Mapping[str, Any], ends: Callable[[str], bool]) -> bool:
    named = schema.get("properties")
    named, others = named if isinstance(named, Mapping) else {}, schema.get("additionalProperties")
    required = (name for name in _list(schema.get("required")) if isinstance(name, str))
    return all(_ends(named.get(name, others), ends) for name in required)


def _array_ends(schema: Mapping[str, Any], ends: Callable[[str], bool]) -> bool:
    least, first = schema.get("minItems"), _list(schema.get("prefixItems"))
    least = least if isinstance(least, int) else 0
    return all(_ends(part, ends) for part in first[:least]) and (
        least <= len(first) or _ends(schema.get("items"), ends)
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
