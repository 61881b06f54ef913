"""Checks that references in hostile schemas cost linear time, and that endless ones agree with a plain search."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.recursion import endless_reference


class _Counted(dict[str, Any]):
    """A dict that counts look-ups over all instances."""

    lookups = 0

    def get(self, *given: Any) -> Any:
        _Counted.lookups += 1
        return super().get(*given)

    def items(self) -> Any:
        for item in super().items():
            _Counted.lookups += 1
            yield item

    @classmethod
    def of(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return cls({key: cls.of(part) for key, part in value.items()})
        return [cls.of(part) for part in value] if isinstance(value, list) else value


def _name(number: int) -> str:
    """Returns one of many percent-encoded spellings of the same name."""
    return "".join(f"%{ord(each):02x}" if number >> place & 1 else each for place, each in enumerate("abcdefghijkl"))


def _aliases(count: int) -> dict[str, Any]:
    named = {f"p{i}": {"$ref": f"#/$defs/{_name(i)}"} for i in range(count)}
    return {"$ref": "#/$defs/abcdefghijkl", "$defs": {"abcdefghijkl": {"type": "object", "properties": named}}}


def _needed_aliases(count: int) -> dict[str, Any]:
    schema = _aliases(count)
    one = schema["$defs"]["abcdefghijkl"]
    return {**schema, "$defs": {"abcdefghijkl": {**one, "required": [*one["properties"]]}}}


def _used_links(count: int) -> dict[str, Any]:
    """Returns a chain of references with a property for each link."""
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    used = {f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(count)}
    return {"type": "object", "properties": used, "$defs": {**links, f"d{count}": {"type": "string"}}}


def _late(count: int) -> dict[str, Any]:
    """Returns an object with many required properties that are resolved one after the other."""
    links: dict[str, Any] = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}]} for i in range(1, count)}
    needs = {f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(count)}
    return {
        "type": "object",
        "properties": {"last": {"$ref": "#/$defs/all"}, **needs},
        "$defs": {
            **links,
            "d0": {"type": "string"},
            "all": {"type": "object", "properties": needs, "required": [*needs]},
        },
    }


def _nested(count: int) -> dict[str, Any]:
    """Returns references to every item of a long list."""
    refs: list[Any] = [{"$ref": f"#/anyOf/{i}"} for i in range(1, count)]
    return {"anyOf": [*refs, {"type": "string"}]}


@pytest.mark.parametrize("make", [_aliases, _needed_aliases, _used_links, _late, _nested])
def test_look_ups_grow_with_the_size_of_the_schema(make: Callable[[int], dict[str, Any]]) -> None:
    for read in (endless_reference, lambda schema: definitions.of_schema(schema, "s")):
        counts = []
        for count in (200, 400, 800):
            schema = _Counted.of(make(count))
            _Counted.lookups = 0
            read(schema)
            counts.append(_Counted.lookups)
        assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0]) + 50, (make.__name__, counts)


@pytest.mark.parametrize("seed", range(300))
def test_endless_references_are_those_of_a_plain_search(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"d{i}" for i in range(draw.randint(1, 6))]
    schema = {"$ref": f"#/$defs/{names[0]}", "$defs": {name: _drawn(draw, names, 0) for name in names}}
    assert (endless_reference(schema) is not None) == _is_endless(schema), schema


def _drawn(draw: random.Random, names: list[str], depth: int) -> Any:
    def part() -> Any:
        return _drawn(draw, names, depth + 1)

    match draw.randrange(8 if depth < 3 else 3):
        case 0:
            return {"type": "string"}
        case 1 | 2:
            return {"$ref": f"#/$defs/{draw.choice(names)}"}
        case 3:
            return {draw.choice(["anyOf", "oneOf", "allOf"]): [part() for _ in range(draw.randint(1, 3))]}
        case 4:
            least = draw.randint(0, 3)
            return {"type": "array", "items": part(), "prefixItems": [part()], "minItems": least}
        case 5:
            return {
                "type": draw.choice([["object", "array"], ["object", "null"], "array"]),
                "items": part(),
                "minItems": 1,
            }
        case _:
            properties = {name: part() for name in "ab"}
            required = draw.sample(["a", "b", "c"], draw.randint(0, 2))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": part()}


def _is_endless(schema: dict[str, Any]) -> bool:
    """Tells whether a used reference is endless, by a fixed-point iteration over all definitions."""
    named = {f"#/$defs/{name}": part for name, part in schema["$defs"].items()}
    ending, used = set[str](), set[str]()
    while more := {name for name, part in named.items() if name not in ending and _ends(part, ending)}:
        ending |= more
    pending: list[Any] = [schema["$ref"]]
    while pending:
        part = pending.pop()
        if isinstance(part, str) and part in named and part not in used:
            used.add(part)
            pending.append(named[part])
        elif isinstance(part, dict):
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return not used <= ending


def _ends(part: Any, ending: set[str]) -> bool:
    if not isinstance(part, dict):
        return True
    if "$ref" in part and part["$ref"] not in ending:
        return False
    if not all(_ends(each, ending) for each in part.get("allOf", ())):
        return False
    if any(key in part and not any(_ends(each, ending) for each in part[key]) for key in ("anyOf", "oneOf")):
        return False
    kinds = {part["type"]} if isinstance(part.get("type"), str) else set(part.get("type", ()))
    ways = []
    if "object" in kinds:
        needed = part.get("required", ())
        properties, others = part.get("properties", {}), part.get("additionalProperties")
        ways.append(all(_ends(properties.get(name, others), ending) for name in needed))
    if "array" in kinds:
        first, least = part.get("prefixItems", []), part["minItems"]
        ways.append(all(_ends(each, ending) for each in [*first, *[part["items"]] * 9][:least]))
    return not kinds or not kinds <= {"object", "array"} or any(ways)
