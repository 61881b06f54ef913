"""Grammars in the forms that requests give them: JSON Schema, regular expressions, Lark, llama.cpp's GBNF, choices.

What a form means in detail is checked where the grammar is compiled (model/grammars/checker.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling import Grammar
from llamaclust.core.sampling_bounds import MAX_GRAMMAR_BYTES, MAX_TRIGGER_BYTES, MAX_TRIGGERS
from llamaclust.model.grammars.schema_parts import with_parts

_GUIDANCE = "x-guidance"
_WHITE_SPACE = r" |\n{1,2}[ \t]{0,20}"
"""Between the parts of a JSON text, as in llama.cpp: a small model could write white space without end."""
_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])
_MAX_GBNF_BYTES = 1 << 17
"""The converter takes about a second for so much as a rule."""
GBNF = "gbnf"
GBNF_START = f'{{"{GBNF}"'
"""How the definition of a grammar in GBNF begins until it is checked, which converts it."""


def of_schema(schema: Mapping[str, Any] | bool, origin: str) -> Grammar:
    """A JSON text that a schema allows. Keywords that cannot be obeyed are refused when the grammar is checked;
    formats that are not known are annotations, as JSON Schema has it."""
    try:
        own = {"allOf": [schema]} if isinstance(schema, bool) else _with_known_formats(schema)
    except RecursionError:
        raise ParameterError(origin, "the schema is nested too deeply") from None
    own = {**own, _GUIDANCE: {"whitespace_pattern": _WHITE_SPACE}}
    return _grammar({"json_schema": own}, origin)


def of_object(origin: str) -> Grammar:
    """Any JSON object."""
    return of_schema({"type": "object"}, origin)


def of_regex(pattern: str, origin: str) -> Grammar:
    """A text that all of a regular expression (Rust's syntax, without look-around) matches."""
    from llguidance import regex_to_lark

    return _grammar({"lark_grammar": f"start: /{regex_to_lark(pattern, '')}/"}, origin)


def of_lark(text: str, origin: str) -> Grammar:
    """A grammar in llguidance's dialect of Lark."""
    return _grammar({"lark_grammar": text}, origin)


def of_gbnf(text: str, origin: str) -> Grammar:
    """A grammar in llama.cpp's form, or in Lark's; the check converts it, which may take long."""
    if len(text) > _MAX_GBNF_BYTES:
        raise ParameterError(origin, f"a grammar of {len(text)} characters, at most {_MAX_GBNF_BYTES} are taken")
    return _defined({GBNF: text}, origin)


def of_choice(texts: Sequence[str], origin: str) -> Grammar:
    """One of some texts."""
    if not texts or not all(texts):
        raise ParameterError(origin, "must be a list of texts, none of them empty")
    return of_lark("start: " + " | ".join(map(_quoted, texts)), origin)


def lazy(grammar: Grammar, triggers: Sequence[str]) -> Grammar:
    """The same, ruling from the first of these texts on; a trigger is the beginning of what the grammar allows."""
    if not 0 < len(triggers) <= MAX_TRIGGERS or not all(
        0 < len(text.encode()) <= MAX_TRIGGER_BYTES for text in triggers
    ):
        reason = f"needs 1 to {MAX_TRIGGERS} triggers of 1 to {MAX_TRIGGER_BYTES} bytes"
        raise ParameterError(grammar.origin, reason)
    return Grammar(grammar.definition, tuple(triggers), grammar.origin)


def _with_known_formats(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_known_formats(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = with_parts(schema, _with_known_formats)
    if isinstance(form := made.get("format"), str) and form not in _FORMATS:
        del made["format"]
    return made


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _grammar(part: Mapping[str, Any], origin: str) -> Grammar:
    return _defined({"grammars": [part]}, origin)


def _defined(whole: Mapping[str, Any], origin: str) -> Grammar:
    """ParameterError where it is too long or holds what JSON cannot."""
    try:
        definition = json.dumps(whole, ensure_ascii=False, allow_nan=False)
        size = len(definition.encode())
    except (ValueError, RecursionError) as error:  # lone surrogates are a ValueError, too
        raise ParameterError(origin, f"cannot be written as JSON: {error}") from error
    if size > MAX_GRAMMAR_BYTES:
        raise ParameterError(origin, f"a grammar of {size} bytes, at most {MAX_GRAMMAR_BYTES} are taken")
    return Grammar(definition, origin=origin)
