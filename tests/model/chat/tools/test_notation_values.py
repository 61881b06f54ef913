"""Checks that any argument passes through each notation: the grammar accepts what a template writes for it, and the
parser reads the same value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest

from llamaclust.model.chat.tools.known_formats import KNOWN_FORMATS, SHOWN_CALLS
from support.chat.argument_samples import OTHERS, TEXTS
from support.chat.llama_cpp_runner import load_template
from support.chat.llama_cpp_source import PACKAGE, find_source
from support.chat.notation_templates import EXCEPTIONS, JSON_NOTATIONS, NOTATIONS, end_tag
from support.chat.rendered_calls import MODES, RenderedCalls, is_same, of_source, problems, random_pieces
from support.seed import SEED

VALUES = {**TEXTS, **OTHERS}
STYLES: dict[str, Callable[[Any], str]] = {
    "compact": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    "two blanks": lambda value: json.dumps(value, ensure_ascii=False, indent=2),
    "four blanks": lambda value: json.dumps(value, ensure_ascii=False, indent=4),
    "tabs": lambda value: json.dumps(value, ensure_ascii=False, indent="\t"),
    "escapes": json.dumps,
    "large escapes": lambda value: json.dumps(value).replace("\\ud83d\\ude00", "\\uD83D\\uDE00"),
}


@cache
def rendered(notation: str, *, has_controls: bool = False) -> RenderedCalls:
    return of_source(NOTATIONS[notation], has_controls=has_controls)


def test_there_are_many_values() -> None:
    assert len(VALUES) >= 60


def test_each_known_format_has_a_template() -> None:
    forms = [rendered(notation).form.calls for notation in NOTATIONS]
    kinds = {(type(calls), getattr(calls, "notation", None), getattr(calls, "is_list", None)) for calls in forms}
    known = [
        calls for calls in (*(known.calls for known in KNOWN_FORMATS), *(calls for _, calls in SHOWN_CALLS)) if calls
    ]
    assert kinds >= {
        (type(calls), getattr(calls, "notation", None), getattr(calls, "is_list", None)) for calls in known
    }
    assert all(calls in forms for calls in (known.calls for known in KNOWN_FORMATS) if calls)


@pytest.mark.parametrize("has_controls", [False, True])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_values_pass_through(notation: str, has_controls: bool) -> None:
    calls, draw = rendered(notation, has_controls=has_controls), Random(SEED)
    found = {label: problems(calls, label, value, draw) for label, value in VALUES.items()}
    excepted = {label for name, label in EXCEPTIONS if name == notation}
    assert not [problem for label, each in found.items() if label not in excepted for problem in each], f"seed {SEED}"
    assert not [label for label in excepted if not found[label]], "the table of exceptions is out of date"


@pytest.mark.parametrize("notation", [name for name in NOTATIONS if end_tag(name)])
@pytest.mark.parametrize("text", ["aTAGb", "TAG", "a\nTAG"])
def test_a_text_ends_at_its_end_tag(notation: str, text: str) -> None:
    """A history shows such a text unchanged. The grammar allows an answer's text up to the tag."""
    calls, value = rendered(notation), text.replace("TAG", end_tag(notation))
    shown = calls.text({"value": value, "other": 1})
    assert value in shown
    read = calls.read([shown], value)
    assert isinstance(read, str) or read != {"value": value, "other": 1}
    for part in range(1, len(end_tag(notation))):
        assert not problems(calls, "part", f"a{end_tag(notation)[:part]} b", Random(SEED))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("notation", JSON_NOTATIONS)
def test_json_may_be_written_in_any_style(notation: str, style: str) -> None:
    calls, draw = rendered(notation), Random(SEED)
    for label in ("astral", "accents", "indented-lines", "mixed-quotes", "nested-object", "mixed-list", "empty-object"):
        value = VALUES[label]
        arguments = {"value": value, "other": 1}
        text = calls.text({"value": "Zqvalue", "other": 1})
        decoder, begin = json.JSONDecoder(), text.rindex("{", 0, text.index('"value"'))
        _, end = decoder.raw_decode(text, begin)
        text = text[:begin] + STYLES[style](arguments) + text[end:]
        for mode in MODES:
            assert not (rest := calls.refused(mode, text, value)), f"{label} {mode}: {rest}"
        for pieces in ([text], [*text], random_pieces(draw, text)):
            assert is_same(calls.read(pieces, value), arguments), f"seed {SEED} {label}"


@pytest.mark.parametrize("notation", ["hermes", "kimi-k2", "harmony", "action", "deepseek"])
def test_arguments_have_the_order_of_the_schema(notation: str) -> None:
    """llguidance follows the order of properties in JSON. The parser reads any order."""
    calls = rendered(notation)
    text = calls.text({"other": 1, "value": "a"})
    assert calls.refused("required", text, "a")
    assert is_same(calls.read([text], "a"), {"value": "a", "other": 1})


@pytest.mark.parametrize("text", ["Rome", "\nRome", "Rome\n", "\nRome\n"])
@pytest.mark.parametrize("value", ["", "  Rome", "Rome\n\n", "\n\n\tRome"])
def test_a_line_break_around_a_tagged_text_is_layout(text: str, value: str) -> None:
    calls = rendered("coder")
    shown = calls.text({"value": "Zqvalue", "other": 1})
    answer = shown.replace("\nZqvalue\n", text.replace("Rome", value))
    for mode in MODES:
        assert not calls.refused(mode, answer, "")
    if text == "\nRome\n":
        assert calls.read([*answer], "") == {"value": value, "other": 1}


@pytest.mark.parametrize("layout", ["{}", "\n{}\n", " {} ", "\n    {}\n  "])
@pytest.mark.parametrize("value", [True, False, None, 5, [1], {"a": None}])
@pytest.mark.parametrize("notation", ["coder", "flat tags", "glm", "muse", "tags with types"])
def test_tagged_values_other_than_texts_may_have_layout(notation: str, value: Any, layout: str) -> None:
    calls = rendered(notation)
    shown = calls.text({"value": 70613, "other": 1})
    for written in {json.dumps(value), repr(value)} if isinstance(value, bool | None) else {json.dumps(value)}:
        answer = re.sub(r"\n?70613\n?", layout.format(written), shown)
        assert not (rest := calls.refused("required", answer, value)), f"{answer!r}: {rest}"
        assert is_same(calls.read([answer], value), {"value": value, "other": 1})


UNEXPRESSED = {
    "": {"control", "largest", "smallest"},  # as in `EXCEPTIONS`
    # The template writes quotes and backslashes in texts without escapes.
    "LFM2.5-8B-A1B.jinja": {"single-quote", "single-quotes", "mixed-quotes", "backslash", "backslashes", "escapes"},
    # The template indents the lines of JSON, which changes texts with unusual line separators.
    "CohereForAI-c4ai-command-r-plus-tool_use.jinja": {"no-break-space"},
    # Items have no type, and null is left out.
    "MiniMax-M3.jinja": {"mixed-list", "nested-lists", "nested-object", "null"},
}


NOT_ALONE = {"Kimi-K3.jinja"}
"""Templates that write calls together with other parts of a message."""


def test_real_templates() -> None:
    source = find_source()
    if source is None:
        pytest.skip(f"no source of llama.cpp; tests/support/chat/llama_cpp_source.py, run, fetches it ({PACKAGE})")
    wrong = []
    for path in sorted((source / "models" / "templates").glob("*.jinja")):
        template = load_template(path)
        if not template.form.takes_call_messages or path.name in NOT_ALONE:
            continue
        calls = RenderedCalls(template.render, template.form)
        for label, value in VALUES.items():
            if label not in UNEXPRESSED[""] | UNEXPRESSED.get(path.name, set()):
                wrong += [f"{path.name} {problem}" for problem in problems(calls, label, value, Random(SEED))]
    assert not wrong, "\n".join(wrong[:20])
