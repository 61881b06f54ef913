"""Builds one-line messages about mistakes in a cluster file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from llamaclust.cluster.config.document import Document, Place
from llamaclust.cluster.config.values import shown

Schema = Mapping[str, Any]


class PlaceError(ValueError):
    """A mistake that involves several values. `place` is the path from the checked section to the value to change."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


def explain(error: ValidationError, document: Document, schema: Schema) -> str:
    """Returns a message about the first unknown key or, if there is none, about the first mistake."""
    details = error.errors(include_url=False)
    # An unknown key may be a misspelt required key.
    first: Any = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    reason = first.get("ctx", {}).get("error")
    place: Place = (*first["loc"], *(reason.place if isinstance(reason, PlaceError) else ()))
    return f"{document.where(place)}: {_what(first, place, schema)}"


def _what(detail: Any, place: Place, schema: Schema) -> str:
    match detail["type"]:
        case "extra_forbidden":
            # The schema of an optional section has null as an alternative.
            sections = _alternatives(_schema_at(schema, place[:-1]), schema)
            known = [key for section in sections for key in section.get("properties", ())]
            meant = _deeper(str(place[-1]), schema) if len(place) == 1 else ""
            return f"unknown key {shown(place[-1])}{_within(place[:-1])}{meant or hint(str(place[-1]), known)}"
        case "missing":
            return f"key {str(place[-1])!r} is missing{_within(place[:-1])}"
        case "value_error":
            return f"{_dotted(place)}: {detail['ctx']['error']}"
        case _:
            allowed = _allowed(_schema_at(schema, place), schema)
            return f"{_dotted(place)}: {shown(detail['input'])} is not possible; give {allowed}"


def _deeper(key: str, schema: Schema) -> str:
    """Returns text that names the section to which `key` probably belongs, or "" if there is no such section."""
    within = []
    for name, section in schema["properties"].items():
        for option in _alternatives(section, schema):
            items = [] if "items" not in option else list(_alternatives(option["items"], schema))
            within += [name for part in (option, *items) if key in part.get("properties", ())]
    match within:
        case ["workers", *_]:
            return (
                f"; it is a key of workers: give it under `workers:` in the file, or as workers.NAME.{key} with --set"
            )
        case [name]:
            return f"; it is a key of `{name}`: {name}.{key} with --set"
    return ""


def hint(word: str, known: Sequence[str]) -> str:
    """Suggests the most similar known word. If none is similar, lists all known words."""
    near = get_close_matches(word[:100], known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _dotted(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _within(place: Place) -> str:
    return f" in {_dotted(place)}" if place else ""


def _schema_at(root: Schema, place: Place) -> Schema:
    schema = root
    for part in place:
        key = "items" if isinstance(part, int) else "properties"
        within = next(option[key] for option in _alternatives(schema, root) if key in option)
        schema = within if isinstance(part, int) else within[part]
    return schema


def _alternatives(schema: Schema, root: Schema) -> Iterator[Schema]:
    if "$ref" in schema:
        yield from _alternatives(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    elif "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from _alternatives(option, root)
    else:
        yield schema


def _allowed(schema: Schema, root: Schema) -> str:
    ways = [_way(option) for option in _alternatives(schema, root) if option.get("type") != "null"]
    return " or ".join(ways)


def _way(schema: Schema) -> str:
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " or ".join(schema["enum"])
    match schema["type"]:
        case "integer":
            return f"a whole number from {schema['minimum']} to {schema['maximum']}"
        case "number":
            if "minimum" in schema:
                return f"a number from {schema['minimum']:g} to {schema['maximum']:,.0f}"
            return f"a number above {schema['exclusiveMinimum']:g} and up to {schema['maximum']:,.0f}"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list of {schema.get('minItems', 0)} to {schema['maxItems']} items"
        case "object":
            known = schema.get("properties")
            return f"keys with values: {', '.join(known)}" if known else "keys with values"
        case _ if "pattern" in schema:
            return f"text like {schema['examples'][0]}"
        case _:
            most = schema.get("maxLength")
            return "text" if most is None else f"text of {schema.get('minLength', 0)} to {most} characters"
