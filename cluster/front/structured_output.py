"""Fields that constrain answers with a grammar, under the names of OpenAI, llama.cpp, vLLM and SGLang."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llamaclust.cluster.front.json_text import MAX_FIELD_VALUES, outline
from llamaclust.cluster.front.schema import Body
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.bounds import MAX_GRAMMAR_BYTES
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions

_VLLM_FLAGS = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback", "whitespace_pattern")


def _object(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


_Object = Annotated[dict[str, Any], BeforeValidator(_object), WithJsonSchema({"type": "object"})]
_Any = Annotated[Any, WithJsonSchema({})]


class GrammarFields(Body):
    """Constraints on the form of an answer. Several constraints in one request must require the same form."""

    response_format: _Object | None = None
    """Form of the answer. It is `{"type": "json_object"}`, `{"type": "json_schema", "json_schema": {"schema": ...}}`,
    or `{"type": "text"}`."""
    json_schema: _Any = None
    grammar: str = ""
    """A grammar for the answer, in llama.cpp's GBNF or llguidance's dialect of Lark."""
    structured_outputs: _Object | None = None
    """vLLM's field: an object with exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`."""
    guided_json: _Any = None
    """A JSON schema for the answer. The `guided_` fields are older fields of vLLM."""
    guided_regex: str | None = None
    """A regular expression that matches the whole answer."""
    guided_choice: _Any = None
    """A list of texts. The answer is one of them."""
    guided_grammar: str | None = None
    """vLLM's older name of `grammar`."""
    guided_json_object: bool = False
    """True to make the answer a JSON object."""
    regex: str | None = None
    """SGLang's name of `guided_regex`."""
    ebnf: str | None = None
    """SGLang's name of `grammar`."""

    def answer_grammar(self) -> Grammar | None:
        """Returns the grammar, or None if no field constrains the answer. Raises ParameterError for invalid fields."""
        values = {name: getattr(self, name) for name in CONSTRAINTS}
        made = {name: CONSTRAINTS[name][0](value, name) for name, value in values.items() if constrains(name, value)}
        first = next(iter(made), "")
        for name, grammar in made.items():
            if grammar != made[first]:
                raise ParameterError(name, f"cannot be used together with {first}: send only one of the two fields")
        return made.get(first)


def constrains(name: str, value: Any) -> bool:
    """Returns True if this value of a field of GrammarFields constrains answers. The schema {} requires valid JSON."""
    return value not in CONSTRAINTS[name][1]


def response_format_grammar(value: dict[str, Any], origin: str) -> Grammar | None:
    """Returns the grammar of a `response_format`, or None for `text`. `origin` is the field's name in errors."""
    kind = value.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            schema, is_strict = value.get("schema") or {"type": "object"}, False
        case "json_schema":
            wrapped = value.get("json_schema", value)
            if not isinstance(wrapped, dict):
                raise ParameterError(f"{origin}.json_schema", "must be an object with a 'schema'")
            schema, is_strict = wrapped.get("schema"), wrapped.get("strict") is True
            schema = {"type": "object"} if schema is None else schema
        case _:
            reason = f"must be 'text', 'json_object' or 'json_schema', not {str(kind)[:60]!r}"
            raise ParameterError(f"{origin}.type", reason)
    return definitions.of_schema(_schema(schema, origin), origin, closes_objects=is_strict)


def _of_vllm(value: dict[str, Any], origin: str) -> Grammar:
    forms = {name: given for name, given in value.items() if given not in (None, False) and name not in _VLLM_FLAGS}
    if forms == {"json_object": True}:
        return definitions.of_object(origin)
    if len(forms) != 1 or not forms.keys() <= _VLLM_FORMS.keys():
        known = ", ".join((*_VLLM_FORMS, "json_object"))
        raise ParameterError(origin, f"must have exactly one of {known}")
    flags = [name for name in _VLLM_FLAGS if value.get(name)]
    if flags:
        raise ParameterError(f"{origin}.{flags[0]}", "this server does not support this field; remove the field")
    form, given = next(iter(forms.items()))
    return _VLLM_FORMS[form](given, f"{origin}.{form}")


def _schema(value: Any, origin: str) -> dict[str, Any] | bool:
    if isinstance(value, str):
        _check_text(value, origin)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ParameterError(origin, f"is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict | bool):
        raise ParameterError(origin, "a JSON schema must be an object")
    return value


def _check_text(text: str, origin: str) -> None:
    if len(text) > MAX_GRAMMAR_BYTES:
        raise ParameterError(origin, f"the grammar has {len(text)} characters; the limit is {MAX_GRAMMAR_BYTES}")
    values = outline(text.encode("utf-8", "replace")).values
    if values > MAX_FIELD_VALUES:
        raise ParameterError(origin, f"the schema has {values} JSON values; the limit is {MAX_FIELD_VALUES}")


def _text(value: Any, origin: str) -> str:
    if not isinstance(value, str):
        raise ParameterError(origin, "must be a text")
    return value


def _texts(value: Any, origin: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ParameterError(origin, "must be a list of texts")
    if (characters := sum(map(len, value))) > MAX_GRAMMAR_BYTES:
        raise ParameterError(origin, f"has texts of {characters} characters in total; the limit is {MAX_GRAMMAR_BYTES}")
    return value


_Make = Callable[[Any, str], Grammar | None]

_VLLM_FORMS: dict[str, Callable[[Any, str], Grammar]] = {
    "json": lambda value, origin: definitions.of_schema(_schema(value, origin), origin),
    "regex": lambda value, origin: definitions.of_regex(_text(value, origin), origin),
    "choice": lambda value, origin: definitions.of_choice(_texts(value, origin), origin),
    "grammar": lambda value, origin: definitions.of_gbnf(_text(value, origin), origin),
}
_UNSET: tuple[Any, ...] = (None, "", {})
CONSTRAINTS: dict[str, tuple[_Make, tuple[Any, ...]]] = {
    "response_format": (response_format_grammar, (None, {"type": "text"})),
    "json_schema": (_VLLM_FORMS["json"], (None,)),
    "grammar": (_VLLM_FORMS["grammar"], _UNSET),
    "structured_outputs": (_of_vllm, _UNSET),
    "guided_json": (_VLLM_FORMS["json"], (None, "")),
    "guided_regex": (_VLLM_FORMS["regex"], _UNSET),
    "guided_choice": (_VLLM_FORMS["choice"], (None,)),
    "guided_grammar": (_VLLM_FORMS["grammar"], _UNSET),
    "regex": (_VLLM_FORMS["regex"], _UNSET),
    "ebnf": (_VLLM_FORMS["grammar"], _UNSET),
    "guided_json_object": (lambda value, origin: definitions.of_object(origin), (False,)),
}
