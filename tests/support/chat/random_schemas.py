"""Random JSON schemas with short instances, and a random walk through a grammar."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from llamaclust.core.sampler.matchers import AllowedTokens
from llamaclust.model.grammars.matcher import GrammarMatcher

_NAMES = ("name", "age", "of", "the", "many-people", 'quote"d', "é", "x")


def random_schema(source: Random, depth: int = 2) -> dict[str, Any]:
    """Returns a schema, usually of an object, with nested objects and lists up to `depth`."""
    kinds = ["string", "integer", "boolean", "enum", "pattern"] + ["object", "object", "array"] * (depth > 0)
    match "object" if depth == 2 else source.choice(kinds):
        case "object":
            names = source.sample(_NAMES, source.randrange(1, 4))
            required = [name for name in names if source.random() < 0.7]
            properties = {name: random_schema(source, depth - 1) for name in names}
            schema = {"type": "object", "properties": properties, "required": required}
            return {**schema, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": random_schema(source, depth - 1), "maxItems": source.randrange(1, 3)}
        case "enum":
            return {"enum": source.sample(["red", "green", 3, None, True, "long words"], 3)}
        case "pattern":
            return {"type": "string", "pattern": source.choice(["^[a-c]{2,4}$", "^(in|out)-[0-9]$"])}
        case "string":
            return {"type": "string", "maxLength": source.randrange(1, 8)}
        case "integer":
            return {"type": "integer", "minimum": 0, "maximum": source.choice([9, 1200])}
        case _:
            return {"type": "boolean"}


def random_instance(schema: dict[str, Any], source: Random) -> Any:
    """Returns a value that `schema` allows, with properties in the schema's order."""
    if "enum" in schema:
        return source.choice(schema["enum"])
    if "pattern" in schema:
        numbered = f"{source.choice(('in', 'out'))}-{source.randrange(10)}"
        letters = "".join(source.choices("abc", k=source.randrange(2, 5)))
        return letters if "a-c" in schema["pattern"] else numbered
    match schema["type"]:
        case "object":
            required = schema["required"]
            named = schema["properties"]
            taken = [name for name in named if name in required or source.random() < 0.5]
            return {name: random_instance(named[name], source) for name in taken}
        case "array":
            return [random_instance(schema["items"], source) for _ in range(source.randrange(schema["maxItems"] + 1))]
        case "string":
            return "".join(source.choices('ab "\\/\n\té漢😀', k=source.randrange(schema["maxLength"] + 1)))
        case "integer":
            return source.randrange(schema["maximum"] + 1)
        case _:
            return source.random() < 0.5


def token_set(allowed: AllowedTokens | None) -> set[int]:
    """Returns the token ids whose bits are set."""
    assert allowed is not None
    return set(np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little")).tolist())


def walk(matcher: GrammarMatcher, source: Random, most: int = 200) -> tuple[list[int], list[set[int]]]:
    """Returns random tokens until the grammar ends, and the tokens allowed at each of them."""
    tokens: list[int] = []
    sets: list[set[int]] = []
    while len(tokens) < most:
        sets.append(token_set(matcher.allowed()))
        if matcher.is_complete:
            break
        tokens.append(source.choice(sorted(sets[-1])))
        matcher.take(tokens[-1:])
    return tokens, sets
