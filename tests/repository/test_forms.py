"""Checks the forms of a request in docs/internals/architecture.md: the named functions return these types."""

from __future__ import annotations

import ast
import re

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.rule

MOST_FORMS = 18
ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| `([\w/]+\.py)` `([\w.]+)` \|$", re.MULTILINE)
PAGE = (ROOT / "docs/internals/architecture.md").read_text()
FORMS = ROW.findall(PAGE[PAGE.index("## Forms of a chat request") : PAGE.index("## Life of a request")])


def function(path: str, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """Returns the function NAME or the method CLASS.NAME in a file."""
    found: ast.AST = ast.parse((ROOT / path).read_text())
    for part in name.split("."):
        found = next(node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == part)
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    return found


def test_forms_are_numbered_and_few() -> None:
    assert [int(number) for number, *_ in FORMS] == [*range(1, len(FORMS) + 1)]
    assert 10 < len(FORMS) <= MOST_FORMS


@pytest.mark.parametrize(("kind", "path", "name"), [form[1:] for form in FORMS], ids=[form[3] for form in FORMS])
def test_each_form_is_what_its_function_returns(kind: str, path: str, name: str) -> None:
    returned = function(path, name).returns
    assert returned is not None
    names = {node.id for node in ast.walk(returned) if isinstance(node, ast.Name)}
    assert (kind if kind != "ChatBody" else "AnyBody") in names, ast.unparse(returned)
