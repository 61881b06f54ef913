"""Tests of the choice of test cases: it is the same for the same commit, and includes tests that a change affects."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support import choice
from support.choice import Cases
from support.reach import Sources, is_same_code, reached
from support.seed import SEED

NODES = (
    "a.py::test_slow",
    *(f"a.py::test_many[{case}-x]" for case in range(10)),
    "b.py::test_one[0]",
    "b.py::test_two",
)
SECONDS = {"a.py::test_slow": 50.0, "a.py::test_many": 2.0, "b.py::test_one": 1.0}
CASES = Cases(NODES, SECONDS)


def test_the_core_has_a_case_of_each_test_that_fits() -> None:
    core = CASES.core(5.0)
    assert {"b.py::test_one[0]", "b.py::test_two"} < core and len(core) == 3
    assert CASES.core(100.0) == core | {"a.py::test_slow"}
    assert CASES.core(0.5) == {"b.py::test_two"}


def test_the_order_of_collection_changes_no_core() -> None:
    for seed in range(SEED, SEED + 20):
        shuffled = random.Random(seed).sample(NODES, len(NODES))
        assert Cases((*shuffled,), SECONDS).core(5.0) == CASES.core(5.0)


def test_promises_are_in_each_core() -> None:
    assert CASES.core(0.5, ["a.py::test_slow"]) == {"a.py::test_slow"}
    assert CASES.core(51.5, ["a.py::test_slow"]) == {"a.py::test_slow", "b.py::test_one[0]", "b.py::test_two"}


def test_rules_are_in_each_core_with_all_cases() -> None:
    assert CASES.core(0.5, whole=["a.py::test_many"]) == {*NODES[1:11]}
    assert CASES.core(20.5, whole=["a.py::test_many"]) == {*NODES[1:11], "b.py::test_two"}


def test_the_longest_file_runs_first() -> None:
    assert CASES.longest_files_first() == tuple(sorted(NODES, key=lambda node: not node.startswith("a.py")))


def test_the_nearest_files_run_whole() -> None:
    files = [Path("b.py"), Path("a.py")]
    assert CASES.whole_files(files, 2.0) == files[:1]
    assert CASES.whole_files(files, 200.0) == files
    assert CASES.whole_files(files[::-1], 2.0) == []


def test_seconds_of_a_run_replace_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "tests" / name).touch()
    monkeypatch.setattr(choice, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(choice, "RECORD", tmp_path / "tests" / "seconds.json")
    choice.record({"tests/a.py::test_one": 3.0, "tests/b.py::test_two": 4.0, "tests/gone.py::test": 9.0})
    choice.record({"tests/a.py::test_one[0]": 1.0, "tests/a.py::test_one[1]": 2.0, "tests/a.py::test_quick": 0.01})
    assert choice.recorded() == {"tests/a.py::test_one": 1.5, "tests/b.py::test_two": 4.0}


FILES = {
    "core/errors.py": "",
    "wire/frames.py": "from llamaclust.core.errors import Error",
    "cli/__main__.py": "def main():\n    import llamaclust.wire.frames",
    "kernels/_native.pyi": "",
    "kernels/cpu/native/sum.cpp": "",
    "kernels/cpu/product.py": "from llamaclust.kernels import _native",
    "cluster/page/static/page.js": "",
    "cluster/page/app.py": "",
    "docs/page.md": "",
    "tests/conftest.py": "import llamaclust.wire.frames",
    "tests/support/started.py": 'COMMAND = ("-m", "llamaclust.cli")',
    "tests/wire/test_frames.py": "import llamaclust.wire.frames",
    "tests/wire/test_errors.py": "from llamaclust.core import errors",
    "tests/e2e/test_started.py": "from support.started import COMMAND",
    "tests/kernels/test_product.py": "import llamaclust.kernels.cpu.product",
    "tests/cluster/test_page.py": "from llamaclust.cluster.page.app import app",
    "tests/docs/test_page.py": 'PAGE = ROOT / "docs/page.md"',
}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Sources(tmp_path, tuple(Path(name) for name in FILES if name.endswith((".py", ".pyi"))))


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("core/errors.py", ["wire/test_errors", "wire/test_frames", "e2e/test_started"]),
        ("wire/frames.py", ["wire/test_frames", "e2e/test_started"]),
        ("kernels/cpu/native/sum.cpp", ["kernels/test_product"]),
        ("cluster/page/static/page.js", ["cluster/test_page"]),
        ("docs/page.md", ["docs/test_page"]),
        ("tests/support/started.py", ["e2e/test_started"]),
        ("tests/wire/test_frames.py", ["wire/test_frames"]),
    ],
)
def test_a_change_reaches_the_tests_that_need_it_nearest_first(
    sources: Sources, changed: str, tests: list[str]
) -> None:
    assert [*reached([Path(changed)], sources)] == [Path(f"tests/{test}.py") for test in tests]


@pytest.mark.parametrize("changed", ["tests/conftest.py", "pyproject.toml"])
def test_some_changes_reach_every_test(sources: Sources, changed: str) -> None:
    assert len(reached([Path(changed)], sources)) == 6


def test_the_way_to_a_change_is_named(sources: Sources) -> None:
    found = reached([Path("core/errors.py")], sources)
    way = (
        "tests/e2e/test_started.py",
        "tests/support/started.py",
        "cli/__main__.py",
        "wire/frames.py",
        "core/errors.py",
    )
    assert found[Path("tests/e2e/test_started.py")] == (*map(Path, way),)


TEST = 'def test() -> None:\n    """Checks a sum."""\n    assert 1 + 1 == 2  # in decimals\n'


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (TEST.replace("a sum", "an addition").replace("decimals", "integers"), True),
        (f'"""Tests of sums."""\n\n\n{TEST}', True),
        (TEST.replace("1 + 1", "1 + 2"), False),
        (TEST.replace("def test", "async def test"), False),
        (TEST + '    assert "a sum"\n', False),
    ],
)
def test_words_alone_are_no_change_of_a_test(other: str, is_same: bool) -> None:
    assert is_same_code(TEST, other) == is_same
