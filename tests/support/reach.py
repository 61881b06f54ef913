"""Finds the test files that a change affects, by imports of the program and the tests."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.paths import ROOT
from support.structure import PACKAGES, imports_of

_CONFTEST = "conftest.py"
_NATIVE = Path("kernels/_native.pyi")
_NATIVE_SOURCES = ("kernels/cpu/native/", "cmake/", "CMakeLists.txt")
_EVERYTHING = ("pyproject.toml", "constraints.txt")

Reached = Mapping[Path, tuple[Path, ...]]
"""Test files, nearest first, with the chain of imports from the test file to a changed file."""


@dataclass(frozen=True)
class Sources:
    """The Python files of the program, tests and benchmarks, relative to `root`."""

    root: Path
    files: tuple[Path, ...]

    @classmethod
    def read(cls) -> Sources:
        return cls(ROOT, tuple(path for path in map(Path, _git("ls-files")) if path.suffix in (".py", ".pyi")))

    @cached_property
    def by_module(self) -> dict[str, Path]:
        return {name: path for path in self.files if (name := _module_name(path))}

    @cached_property
    def trees(self) -> dict[Path, ast.Module]:
        return {path: ast.parse((self.root / path).read_text()) for path in self.files if (self.root / path).is_file()}

    @cached_property
    def words(self) -> dict[Path, frozenset[str]]:
        """String constants of each file, split at slashes."""
        return {path: frozenset(_words(tree)) for path, tree in self.trees.items()}

    @cached_property
    def importers(self) -> Mapping[Path, list[Path]]:
        """Maps each file to the files that need it: by imports, modules that are started by name, and conftest files.

        A conftest file needs no file here: tests that use its fixtures import parts of the program themselves.
        """
        found = defaultdict[Path, list[Path]](list)
        conftests = {path.parent: path for path in self.files if path.name == _CONFTEST}
        for path, tree in self.trees.items():
            if path.name != _CONFTEST:
                needed = {*self._imported(tree), *(conftests[parent] for parent in path.parents if parent in conftests)}
                for each in needed - {path}:
                    found[each].append(path)
        return found

    def _imported(self, tree: ast.Module) -> Iterator[Path]:
        for module, name in imports_of(tree, lazy=True):
            path = self.by_module.get(f"{module}.{name}") or self.by_module.get(module)
            if path is not None:
                yield path
        for word in _constants(tree):
            if word.startswith("llamaclust"):
                started = self.by_module.get(f"{word}.__main__") or self.by_module.get(word)
                if started is not None:
                    yield started

    def of_change(self, changed: Path) -> Iterator[Path]:
        """Yields the Python files that correspond to a changed file of any kind."""
        text = changed.as_posix()
        if changed in self.trees or changed.suffix in (".py", ".pyi"):
            yield changed
        elif text in _EVERYTHING:
            yield Path("tests", _CONFTEST)
        elif text.startswith(_NATIVE_SOURCES):
            yield _NATIVE
        else:
            folders = {path.parent for path in self.files} - {Path()}
            nearest = next((folder for folder in changed.parents if folder in folders), None)
            yield from (path for path in self.files if path.parent == nearest and changed.parts[0] != "tests")
            names = {changed.name, *(part for part in changed.parent.parts[2:] if changed.parts[0] == "tests")}
            yield from (path for path, words in self.words.items() if names & words)


def reached(changed: Iterable[Path], sources: Sources) -> Reached:
    """Returns the test files that need a changed file. Imports between test files do not add to the distance."""
    starts = dict.fromkeys(path for one in changed for path in sources.of_change(one))
    chains: dict[Path, tuple[Path, ...]] = {path: (path,) for path in starts}
    distance = dict.fromkeys(chains, 0)
    waiting = deque(chains)
    while waiting:
        path = waiting.popleft()
        for importer in sources.importers.get(path, ()):
            step = path.parts[0] != "tests"
            if distance[path] + step < distance.get(importer, 1 << 30):
                distance[importer], chains[importer] = distance[path] + step, (importer, *chains[path])
                (waiting.append if step else waiting.appendleft)(importer)
    tests = (path for path in chains if path.parts[0] == "tests" and path.name.startswith("test_"))
    return {path: chains[path] for path in sorted(tests, key=lambda path: (distance[path], path))}


def changed_since(commit: str) -> list[Path] | None:
    """Returns the files that differ from a commit, including the working tree, or None if the commit is unknown.

    Leaves out test files of which only comments and docstrings differ. The program's docstrings are also help texts.
    """
    try:
        return [
            *(path for path in map(Path, _git("diff", "--name-only", commit)) if not _is_same_test(path, commit)),
            *map(Path, _git("ls-files", "--others", "--exclude-standard")),
        ]
    except subprocess.CalledProcessError:
        return None


def _is_same_test(path: Path, commit: str) -> bool:
    if path.parts[0] != "tests" or path.suffix != ".py" or not (ROOT / path).is_file():
        return False
    before = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return before.returncode == 0 and is_same_code(before.stdout, (ROOT / path).read_text())


def is_same_code(one: str, other: str) -> bool:
    """Compares Python sources without comments and docstrings."""
    return _code(one) == _code(other)


def _code(source: str) -> str:
    return ast.dump(_WithoutDocstrings().visit(ast.parse(source)))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    match parts[0]:
        case "src":
            parts = parts[1:]
        case "tests" | "benchmarks":
            parts = parts[1:]
        case first if first in (*PACKAGES, "proto"):
            parts = ("llamaclust", *parts)
        case _:
            return ""
    return ".".join(parts).removesuffix(".__init__")


def _constants(tree: ast.Module) -> Iterator[str]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _words(tree: ast.Module) -> Iterator[str]:
    for text in _constants(tree):
        if len(text) < 200:
            yield from text.split("/")
