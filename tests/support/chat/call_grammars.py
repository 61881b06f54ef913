"""Builds grammars of tool calls in the formats of the sample templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaclust.model.chat.tools.constraint.arguments_schema import arguments_schema
from llamaclust.model.chat.tools.constraint.call_grammar import CallGrammar, CallStart, call_grammar
from llamaclust.model.chat.tools.constraint.lark_rules import Split
from support.chat.sample_templates import form_of


def calls_of(
    form: str,
    tools: Mapping[str, Any],
    split: Split,
    start: CallStart = CallStart.ANSWER,
    *,
    is_parallel: bool = True,
) -> CallGrammar | None:
    schemas = {name: arguments_schema(schema).schema for name, schema in tools.items()}
    return call_grammar(form_of(form), schemas, split, start, is_parallel=is_parallel)
