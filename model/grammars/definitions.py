"""Makes grammars from a request's JSON Schema, regular expression, Lark, GBNF (llama.cpp's format) or choices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_GRAMMAR_BYTES, MAX_TRIGGER_BYTES, MAX_TRIGGERS
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars.normal_schema import normal_schema

GUIDANCE = "x-guidance"
JSON_TEXT = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,40}", "json_allow_general_unicode_escapes": True}
"""Options of JSON text. White space is limited, because a small model might write it without end. Texts may have any
\\u escape. llguidance has no option for an escaped slash or an unescaped U+007F."""
_MOST_PLACES = 8
_MAX_GBNF_BYTES = 1 << 17
"""The maximum size of a GBNF grammar. Converting one rule of this size takes about a second."""
GBNF = "gbnf"
GBNF_START = f'{{"{GBNF}"'


OWN_RULES = "own_rules"
"""The name of grammars that this package wrote itself. A user cannot give this name to a grammar."""


def of_schema(schema: Mapping[str, Any] | bool, origin: str, *, closes_objects: bool = False) -> Grammar:
    """Returns a grammar of JSON texts that match a schema. Raises ParameterError if a keyword cannot be expressed."""
    try:
        normal = normal_schema(schema, closes_objects=closes_objects)
    except RecursionError:
        raise ParameterError(origin, "the schema is nested too deeply") from None
    if normal.unobeyed:
        reason = f"a grammar cannot express {', '.join(normal.unobeyed[:_MOST_PLACES])}: remove it from the schema"
        raise ParameterError(origin, reason)
    return _grammar({"json_schema": {**normal.schema, GUIDANCE: JSON_TEXT}}, origin)


def of_object(origin: str) -> Grammar:
    return of_schema({"type": "object"}, origin)


def of_regex(pattern: str, origin: str) -> Grammar:
    """Returns a grammar of texts that match a whole regular expression. The syntax is Rust's, without look-around."""
    from llguidance import regex_to_lark

    return _grammar({"lark_grammar": f"start: /{regex_to_lark(pattern, '')}/"}, origin)


def of_lark(text: str, origin: str) -> Grammar:
    return _grammar({"lark_grammar": text}, origin)


def of_calls(rules: str, origin: str) -> Grammar:
    """Returns a grammar of tool calls. `rules` are in llguidance's Lark, and were made by this package."""
    return _grammar({"name": OWN_RULES, "lark_grammar": rules}, origin)


def of_gbnf(text: str, origin: str) -> Grammar:
    """Returns a grammar of GBNF or Lark text. The grammar check converts the text later, because this may be slow."""
    if len(text) > _MAX_GBNF_BYTES:
        raise ParameterError(origin, f"the grammar has {len(text)} characters; the limit is {_MAX_GBNF_BYTES}")
    return _defined({GBNF: text}, origin)


def of_choice(texts: Sequence[str], origin: str) -> Grammar:
    if not texts or not all(texts):
        raise ParameterError(origin, "expected a list of one or more non-empty texts")
    return of_lark("start: CHOICE\nCHOICE: " + " | ".join(map(quoted, texts)), origin)


def either(calls: str, other: Grammar) -> Grammar:
    (part,) = json.loads(other.definition)["grammars"]
    lark = calls.replace("start:", "calls:", 1)
    both = [{"name": OWN_RULES, "lark_grammar": f"start: calls | @other\n{lark}"}, {**part, "name": "other"}]
    return _defined({"grammars": both}, other.origin)


def has_schemas_only(definition: str) -> bool:
    """Returns True if the definition has only schemas and rules from this package, and no rules from a user."""
    try:
        parts = json.loads(definition)["grammars"]
        return all("json_schema" in part or part.get("name") == OWN_RULES for part in parts)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # llguidance reports it later.
        return False


def lazy(grammar: Grammar, triggers: Sequence[str]) -> Grammar:
    """Returns a grammar that allows any text up to the first trigger, and follows `grammar` from the trigger on."""
    if not 0 < len(triggers) <= MAX_TRIGGERS or not all(
        0 < len(text.encode()) <= MAX_TRIGGER_BYTES for text in triggers
    ):
        reason = f"expected 1 to {MAX_TRIGGERS} triggers of 1 to {MAX_TRIGGER_BYTES} bytes"
        raise ParameterError(grammar.origin, reason)
    return Grammar(grammar.definition, tuple(triggers), grammar.origin)


def quoted(text: str) -> str:
    """Returns the text as a string literal for llguidance's Lark: a JSON string in which DEL is escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _grammar(part: Mapping[str, Any], origin: str) -> Grammar:
    return _defined({"grammars": [part]}, origin)


def _defined(whole: Mapping[str, Any], origin: str) -> Grammar:
    try:
        definition = json.dumps(whole, ensure_ascii=False, allow_nan=False)
        size = len(definition.encode())
    except (ValueError, RecursionError) as error:  # A lone surrogate raises ValueError too.
        raise ParameterError(origin, f"the grammar cannot be written as JSON: {error}") from error
    if size > MAX_GRAMMAR_BYTES:
        raise ParameterError(origin, f"the grammar has {size} bytes; the limit is {MAX_GRAMMAR_BYTES}")
    return Grammar(definition, origin=origin)
