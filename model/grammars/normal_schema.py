"""Rewrites JSON schemas for llguidance, and lists the keywords that llguidance cannot obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.model.grammars.closed_schema import COMBINING, closed
from llamaclust.model.grammars.schema_keywords import (
    SIZES,
    as_list,
    as_object,
    bounds,
    count,
    matches_all,
    normal_types,
    text_forms,
    texts,
    unusable_numbers,
)
from llamaclust.model.grammars.schema_references import MISSING, SchemaReferences

_COMBINED: Final = ("anyOf", "oneOf", "allOf")
_REFUSED: Final = ("not", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
_EVALUATED: Final = frozenset((*_COMBINED, "$ref", "if", "then", "else", "dependentSchemas", "patternProperties"))
"""Keywords that give `unevaluatedProperties` another meaning than `additionalProperties`."""
_TOGETHER: Final = (
    frozenset(("properties", "patternProperties", "additionalProperties", "propertyNames")),
    frozenset(("items", "prefixItems")),
)
"""Groups of keywords whose meaning depends on others of the group in the same schema."""


@dataclass(frozen=True, slots=True)
class NormalSchema:
    """A normalized JSON schema, which may allow more than the original. `unobeyed` has the paths of omitted keywords,
    such as `properties.a.not`."""

    schema: dict[str, Any]
    unobeyed: tuple[str, ...] = ()


def normal_schema(schema: Any, *, closes_objects: bool = False) -> NormalSchema:
    """Normalizes a JSON schema. If `closes_objects`, also forbids unnamed properties. May raise RecursionError."""
    reader = _Reader(schema)
    read = reader.read(schema, "")
    made = {"allOf": [read]} if isinstance(read, bool) else read
    if definitions := reader.definitions():
        made = {**made, "$defs": definitions}
    dropped = {place.rpartition(".")[2] for place in reader.unobeyed}
    if closes_objects and COMBINING.isdisjoint(dropped):
        made = dict(closed(made))
    return NormalSchema(made, tuple(reader.unobeyed))


class _Reader:
    def __init__(self, root: Any) -> None:
        self.unobeyed: dict[str, None] = {}  # Places, in the order of reading.
        self._references = SchemaReferences(root)
        self._names: dict[int, str] = {}  # Names of definitions. The keys are the ids of the defined schemas.
        self._waiting: list[tuple[str, Any]] = []  # Definitions that were not read yet.

    def definitions(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while self._waiting:
            name, schema = self._waiting.pop()
            made[name] = self.read(schema, f"$defs.{name}")
        return made

    def read(self, schema: Any, place: str) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):  # An empty list is valid, because PHP writes an empty object so.
            if schema not in (None, []):
                self._leave_out(place, "")
            return {}
        if schema.get("not") in (True, {}, []) and "not" in schema:  # The library zod writes `never` in this form.
            return False
        types, is_known = normal_types(schema.get("type"))
        made: dict[str, Any] = {"type": types[0] if len(types) == 1 else types} if types else {}
        if not is_known:
            self._leave_out(place, "type")
        self._read_value(schema, made, place)
        made |= self._properties(schema, place) | self._items(schema, place) | self._combined(schema, place)
        self._refuse(schema, place)
        return _or_null(made) if schema.get("nullable") is True or schema.get("x-nullable") is True else made

    def _leave_out(self, place: str, keyword: str) -> None:
        self.unobeyed[f"{place}.{keyword}".strip(".")] = None

    def _read_value(self, schema: Mapping[str, Any], made: dict[str, Any], place: str) -> None:
        listed = as_list(schema.get("enum"))
        if "const" in schema:
            made["const"] = schema["const"]
        if listed:
            made["enum"] = listed
        elif listed is not None:
            self._leave_out(place, "enum")
        forms, is_whole = text_forms(schema)
        if not is_whole:
            self._leave_out(place, "pattern")
        types = [] if {"const", "enum"} & made.keys() else normal_types(schema.get("type"))[0]
        sizes = {key: value for key in SIZES if (value := count(schema, key)) is not None}
        made |= {**forms, **sizes, **bounds(schema, types)}

    def _properties(self, schema: Mapping[str, Any], place: str) -> dict[str, Any]:
        given = as_object(schema.get("properties"))
        named = {str(name): self.read(part, f"{place}.properties.{name}") for name, part in given.items()}
        required = [*texts(schema.get("required")), *(str(name) for name, part in given.items() if _is_required(part))]
        patterns = {
            str(pattern): self.read(part, f"{place}.patternProperties.{pattern}")
            for pattern, part in as_object(schema.get("patternProperties")).items()
        }
        made: dict[str, Any] = {"properties": named} if isinstance(schema.get("properties"), Mapping | list) else {}
        if not given and schema.get("properties"):
            self._leave_out(place, "properties")
        others = schema.get("additionalProperties")
        if others is None and schema.get("unevaluatedProperties") is not None and _EVALUATED.isdisjoint(schema):
            others = schema["unevaluatedProperties"]
        if others is not None:
            read = self.read(others, f"{place}.additionalProperties")
            made["additionalProperties"] = True if read == {} else read
        if patterns and not named and all(map(matches_all, patterns)):  # Properties may have any names.
            made["additionalProperties"] = next(iter(patterns.values()))
        elif patterns:
            made["patternProperties"] = patterns
        self._name_properties(schema, made, place)
        if required:
            made["required"] = [*dict.fromkeys(required)]
        return made | self._property_counts(schema, made, place)

    def _name_properties(self, schema: Mapping[str, Any], made: dict[str, Any], place: str) -> None:
        """Converts `propertyNames` to `properties` or `patternProperties` if the schema has neither."""
        given = schema.get("propertyNames")
        rule = {} if given is None else self.read(given, f"{place}.propertyNames")
        if rule is True or rule in ({}, {"type": "string"}):
            return
        known = {} if isinstance(rule, bool) else {key: value for key, value in rule.items() if key != "type"}
        listed = texts(known.get("enum", [known["const"]] if "const" in known else None))
        is_alone = not made.get("properties") and "patternProperties" not in made
        others = made.get("additionalProperties", True)
        if is_alone and len(known) == 1 and listed:
            made |= {"properties": dict.fromkeys(listed, others), "additionalProperties": False}
        elif is_alone and known.keys() == {"pattern"}:
            made |= {"patternProperties": {known["pattern"]: others}, "additionalProperties": False}
        else:
            self._leave_out(place, "propertyNames")

    def _property_counts(self, schema: Mapping[str, Any], made: dict[str, Any], place: str) -> dict[str, int]:
        """Returns limits on the property count. llguidance obeys them only if all named properties are required."""
        least, most = (count(schema, key) for key in ("minProperties", "maxProperties"))
        named, required = made.get("properties", {}), made.get("required", ())
        if all(name in required for name in named):
            return {
                key: value for key, value in (("minProperties", least), ("maxProperties", most)) if value is not None
            }
        if least is not None and least > len(required):
            self._leave_out(place, "minProperties")
        is_closed = made.get("additionalProperties") is False and "patternProperties" not in made
        if most is not None and not (is_closed and most >= len(named)):
            self._leave_out(place, "maxProperties")
        return {}

    def _items(self, schema: Mapping[str, Any], place: str) -> dict[str, Any]:
        first, others = schema.get("prefixItems"), schema.get("items")
        if isinstance(others, list) and others:  # Draft 7 has this form.
            first, others = others, schema.get("additionalItems")
        made: dict[str, Any] = {}
        if isinstance(first, list) and first:
            made["prefixItems"] = [self.read(part, f"{place}.items.{at}") for at, part in enumerate(first)]
        if others is None and _EVALUATED.isdisjoint(schema):
            others = schema.get("unevaluatedItems")
        if others is not None and (read := self.read(others, f"{place}.items")) not in ({}, True):
            made["items"] = read
        return made

    def _combined(self, schema: Mapping[str, Any], place: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key in _COMBINED:
            if parts := as_list(schema.get(key)):
                made[key] = [self.read(part, f"{place}.{key}.{at}") for at, part in enumerate(parts)]
        if (
            len(made.get("allOf", ())) == 1
            and isinstance(made["allOf"][0], dict)
            and schema.keys().isdisjoint(only := made["allOf"][0])
            and all(group.isdisjoint(schema) or group.isdisjoint(only) for group in _TOGETHER)
        ):
            del made["allOf"]
            made |= only
        if isinstance(reference := schema.get("$ref"), str):
            target = self._references.find(reference)
            if target is MISSING:
                self._leave_out(place, "$ref")
            else:
                made["$ref"] = f"#/$defs/{self._name(target)}"
        return made

    def _name(self, target: Any) -> str:
        if id(target) not in self._names:
            self._names[id(target)] = f"d{len(self._names)}"
            self._waiting.append((self._names[id(target)], target))
        return self._names[id(target)]

    def _refuse(self, schema: Mapping[str, Any], place: str) -> None:
        for key in unusable_numbers(schema):
            self._leave_out(place, key)
        for key in _REFUSED:
            if schema.get(key) not in (None, False, {}, []):
                self._leave_out(place, key)
        if "if" in schema and ("then" in schema or "else" in schema):
            self._leave_out(place, "if")
        if schema.get("uniqueItems") is True and count(schema, "maxItems") not in (0, 1):
            self._leave_out(place, "uniqueItems")
        if _limits_contents(schema):
            self._leave_out(place, "contains")
        if not _EVALUATED.isdisjoint(schema):
            for key in ("unevaluatedProperties", "unevaluatedItems"):
                if schema.get(key) not in (None, True, {}, []):
                    self._leave_out(place, key)


def _limits_contents(schema: Mapping[str, Any]) -> bool:
    """Returns True if `contains` forbids arrays that the other keywords allow."""
    if (contains := schema.get("contains")) in (None, []):
        return False
    least = count(schema, "minContains") or 0 if "minContains" in schema else 1
    most = count(schema, "maxContains")
    if contains in ({}, True):  # Every item counts.
        items = count(schema, "maxItems")
        return least > (count(schema, "minItems") or 0) or (most is not None and (items is None or most < items))
    return least > 0 or most is not None


def _is_required(part: Any) -> bool:
    """Returns True if a property's own schema has `required: true`, as in draft 3 and many handwritten schemas."""
    return isinstance(part, Mapping) and part.get("required") is True


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if not schema or _allows_null(schema):
        return schema
    simple = schema.get("type")
    if simple and not {"enum", "const", "$ref", *_COMBINED} & schema.keys():
        return {**schema, "type": [*([simple] if isinstance(simple, str) else simple), "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _allows_null(schema: dict[str, Any]) -> bool:
    types = schema.get("type")
    return isinstance(types, list) and "null" in types and "enum" not in schema
