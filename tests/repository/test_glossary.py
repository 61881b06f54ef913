"""Identifiers use the terms of docs/internals/glossary.md and none of the words in its columns *not*."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.rule

GLOSSARY = ROOT / "docs/internals/glossary.md"
PYTHON, C_LIKE = {".py", ".pyi"}, {".cpp", ".h", ".cu", ".cuh", ".proto"}
COMMENTS_AND_STRINGS = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"', re.DOTALL)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
KEY = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")


def table_rows() -> list[list[str]]:
    lines = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "term"]


def excluded_terms() -> set[str]:
    return {term for row in table_rows() for term in re.findall(r"`([^`]+)`", row[2])}


def words(identifier: str) -> str:
    """Returns an identifier's words, such as ` stage step ` for `StageStep` and `stage_step`."""
    return f" {' '.join(word.lower() for word in WORD.findall(identifier))} "


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    rows = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    paths = [ROOT / path for mode, _, _, path in rows if mode != "120000" and "_pb2" not in path]
    return [path for path in paths if path.suffix in PYTHON | C_LIKE]


def python_identifiers(path: Path) -> Iterator[str]:
    """Yields the names that a module defines, and the keys of its dictionaries."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Dict(keys=keys):
                constants = [key.value for key in keys if isinstance(key, ast.Constant)]
                yield from (key for key in constants if isinstance(key, str) and KEY.fullmatch(key))
            case _:
                pass


def identifiers(path: Path) -> Iterator[str]:
    if path.suffix in PYTHON:
        yield from python_identifiers(path)
    else:
        yield path.stem
        yield from re.findall(r"[A-Za-z_]\w*", COMMENTS_AND_STRINGS.sub(" ", path.read_text()))


def found_terms(path: Path, terms: set[str]) -> set[str]:
    """Returns the terms that are in identifiers. Only files that have one of them anywhere are parsed, to save time."""
    anywhere = terms_of({path.stem, *re.findall(r"[A-Za-z_]\w*", path.read_text())}, terms)
    return terms_of({*identifiers(path)}, anywhere) if anywhere else anywhere


def terms_of(names: set[str], terms: set[str]) -> set[str]:
    capitalized = {term for term in terms if term[0].isupper()}
    inside = "|".join(words(name) for name in names if not name.startswith("test_"))
    return (capitalized & names) | {term for term in terms - capitalized if words(term) in inside}


def package(path: Path) -> str:
    """Returns the first two folders of a source file's path, or the first folder of a test's path."""
    folders = path.relative_to(ROOT).parts[:-1]
    return "/".join(folders[: 1 if folders[:1] in (("tests",), ("benchmarks",)) else 2])


def test_every_term_has_a_meaning_of_its_own() -> None:
    rows = table_rows()
    assert len(rows) > 60 and all(len(row) == 3 and all(row) for row in rows)
    terms = [term.strip() for row in rows for term in row[0].split(",")]
    assert len(set(terms)) == len(terms)


def test_words_of_identifiers() -> None:
    assert words("StageStep") == words("stage_step") == words("STAGE_STEP") == " stage step "
    assert words("KVBlock16") == " kv block 16 "
    assert " ask " not in words("task_mask")


def test_identifiers_use_no_excluded_term() -> None:
    terms = excluded_terms()
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        found[package(path)] |= found_terms(path, terms)
    assert {name: sorted(words) for name, words in found.items() if words} == {}
