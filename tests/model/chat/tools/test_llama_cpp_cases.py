"""Runs llama.cpp's parser cases with its own templates if its source is available."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.chat.llama_cpp_cases import Case, read_cases
from support.chat.llama_cpp_runner import load_template, run_case
from support.chat.llama_cpp_source import PACKAGE, find_source


@pytest.fixture(scope="module")
def source() -> Path:
    found = find_source()
    if found is None:
        pytest.skip(f"no source of llama.cpp; tests/support/chat/llama_cpp_source.py, run, fetches it ({PACKAGE})")
    return found


def test_95_percent_of_the_cases_pass(source: Path) -> None:
    cases = read_cases(source / "tests" / "test-chat.cpp")
    assert len(cases) > 400
    failures = [difference for case in cases if (difference := _difference(source, case))]
    assert len(failures) <= 0.05 * len(cases), "\n".join(failures)


def _difference(source: Path, case: Case) -> str:
    found = run_case(load_template(source / "models" / "templates" / case.template), case)
    return found and f"{case.template}:{case.line}: {found}"
