"""Measures the structure of the source: folders, imports, classes, functions and lines. `make structure` prints it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "tools", "cluster", "worker", "kernels", "model", "wire", "core")
_SOURCES = {".py", ".cpp", ".h", ".cu", ".proto"}
_COUNTED = _SOURCES | {".cuh", ".js", ".css", ".html", ".pyi", ".jinja"}
_GENERATED = ("_pb2.py", "_pb2.pyi")
_NATIVE = "llamaclust.kernels._native"
FRONT = ("cluster/front/", "cluster/client/", "cluster/state/journal")
"""Path prefixes of the code between HTTP requests and the engine, including the Python clients."""
_FRONT_PARTS = (*("cluster/engine/request_stream", "cluster/engine/inbox", "cluster/server/front"),)

Graph = Mapping[str, frozenset[str]]
"""The imports of each module, by module name."""


@cache
def tracked() -> tuple[Path, ...]:
    """Returns the repository's source files, without generated files, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (Path(line) for line in listed.splitlines())
    return tuple(
        path
        for path in paths
        if path.suffix in _COUNTED and not path.name.endswith(_GENERATED) and (ROOT / path).is_file()
    )


def product() -> Iterator[Path]:
    """Returns the source files of the program, without tests, benchmarks and examples."""
    return (path for path in tracked() if path.parts[0] in (*PACKAGES, "proto", "src"))


def front() -> list[Path]:
    """Returns the Python modules of the front end."""
    return [path for path in product() if path.suffix == ".py" and path.as_posix().startswith(FRONT + _FRONT_PARTS)]


def files_in_folders() -> Counter[Path]:
    return Counter(path.parent for path in tracked() if path.suffix in _SOURCES)


def folders_in_folders() -> Counter[Path]:
    """Returns the number of subfolders of each folder below the root."""
    folders = {parent for path in tracked() for parent in path.parents}
    return Counter(folder.parent for folder in folders if len(folder.parts) > 1)


def lines() -> Counter[str]:
    """Returns the program's number of lines by top-level folder."""
    counts = Counter[str]()
    for path in product():
        counts[path.parts[0]] += _lines_of(path)
    return counts


def _lines_of(path: Path) -> int:
    return (ROOT / path).read_text().count("\n")


@dataclass(frozen=True)
class Modules:
    """The program's Python modules by name."""

    paths: Mapping[str, Path]

    @classmethod
    def read(cls) -> Modules:
        found = {}
        for path in product():
            if path.suffix == ".py" and path.parts[0] != "proto":
                parts = path.with_suffix("").parts
                name = ".".join(parts[1:] if parts[0] == "src" else ("llamaclust", *parts))
                found[name.removesuffix(".__init__")] = path
        return cls(found)

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse((ROOT / path).read_text()) for name, path in self.paths.items()}

    def graph(self, *, lazy: bool) -> Graph:
        """Returns the module-level imports of each module. With `lazy`, includes imports inside functions."""
        return {name: frozenset(self._known(tree, lazy)) - {name} for name, tree in self.trees.items()} | {
            _NATIVE: frozenset()
        }

    def _known(self, tree: ast.Module, lazy: bool) -> Iterator[str]:
        for module, name in imports_of(tree, lazy):
            full = f"{module}.{name}"
            known = full if full in self.paths or full == _NATIVE else module
            if known in self.paths or known == _NATIVE:
                yield known


def imports_of(node: ast.AST, lazy: bool) -> Iterator[tuple[str, str]]:
    """Yields (module, imported name). With `lazy`, includes imports inside functions."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ImportFrom(module=str(module), names=names):
                yield from ((module, alias.name) for alias in names)
            case ast.Import(names=names):
                yield from ((alias.name, "") for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not lazy:
                continue
            case _:
                yield from imports_of(child, lazy)


def circle(graph: Graph) -> list[str]:
    """Returns an import cycle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def longest(graph: Graph) -> list[str]:
    """Returns the longest chain of imports in a graph without cycles."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        tails: list[tuple[str, ...]] = [chain(imported) for imported in sorted(graph[module])]
        return (module, *max(tails, key=len, default=()))

    chains: list[tuple[str, ...]] = [chain(module) for module in graph]
    found: tuple[str, ...] = max(chains, key=len, default=())
    return list(found)


def deepest(graph: Graph, target: str = _NATIVE) -> list[str]:
    """Returns the longest chain of imports from the command line to a module, in a graph without cycles."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        if module == target:
            return (module,)
        tails = (chain(imported) for imported in sorted(graph[module]))
        tail = max((tail for tail in tails if tail), key=len, default=())
        return (module, *tail) if tail else ()

    starts: list[tuple[str, ...]] = [chain(module) for module in graph if module.startswith("llamaclust.cli")]
    found: tuple[str, ...] = max(starts, key=len, default=())
    return list(found)


def arrows(graph: Graph, package: str = "llamaclust.cluster") -> dict[str, set[str]]:
    """Returns the imports between the subpackages of a package."""
    found: dict[str, set[str]] = defaultdict(set)
    prefix = f"{package}."
    for module, imported in graph.items():
        if module.startswith(prefix):
            room = module.removeprefix(prefix).split(".")[0]
            others = {name.removeprefix(prefix).split(".")[0] for name in imported if name.startswith(prefix)}
            found[room] |= others - {room}
    return dict(found)


def large_classes(modules: Modules, attributes: int = 12, methods: int = 15) -> Iterator[str]:
    """Yields classes with more attributes (set by methods) or more methods. Fields of dataclasses do not count."""
    for module, tree in modules.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                functions = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
                own = {target.attr for function in functions for target in _assigned(function)}
                if len(own) > attributes or len(functions) > methods:
                    yield f"{module}.{node.name}: {len(own)} attributes, {len(functions)} methods"


def _assigned(function: ast.AST) -> Iterator[ast.Attribute]:
    """Yields assignments to attributes of `self`."""
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                yield node


def long_signatures(modules: Modules, most: int = 6) -> Iterator[str]:
    """Yields functions with more than `most` parameters, except in `cli`, where parameters are options."""
    for module, tree in modules.trees.items():
        if not module.startswith("llamaclust.cli"):
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    count = len([one for one in given if one.arg not in ("self", "cls")])
                    if count > most:
                        yield f"{module}.{node.name}: {count}"


def report() -> Iterator[str]:
    """Yields all figures as lines."""
    files, folders = files_in_folders(), folders_in_folders()
    yield from (f"folder with {count} source files: {path}" for path, count in files.most_common() if count > 20)
    yield from (f"folder with {count} sub-folders: {path}" for path, count in folders.most_common() if count > 12)
    modules = Modules.read()
    plain, lazy = modules.graph(lazy=False), modules.graph(lazy=True)
    rooms = arrows(lazy)
    yield f"cluster/: {len(rooms)} rooms, {sum(map(len, rooms.values()))} arrows, circle: {circle_of(rooms)}"
    yield from (f"  {room} -> {', '.join(sorted(others))}" for room, others in sorted(rooms.items()) if others)
    for name, graph in (("module-level", plain), ("lazy", lazy)):
        found = circle(graph)
        yield f"{name} imports: circle: {' > '.join(map(_short, found)) or 'none'}"
        if not found:
            chain = deepest(graph)
            yield f"  depth to a native call: {len(chain)}: {' > '.join(map(_short, chain))}"
            chain = longest(graph)
            yield f"  longest chain: {len(chain)}: {' > '.join(map(_short, chain))}"
    yield from (f"large class: {line}" for line in large_classes(modules))
    yield from (f"parameters: {line}" for line in long_signatures(modules))
    paths = front()
    yield f"front: {sum(map(_lines_of, paths))} lines in {len(paths)} files"
    counts = lines()
    yield f"{sum(counts.values())} lines: {', '.join(f'{name} {count}' for name, count in counts.most_common())}"


def circle_of(rooms: Mapping[str, set[str]]) -> str:
    return " > ".join(circle({room: frozenset(others) for room, others in rooms.items()})) or "none"


def _short(module: str) -> str:
    return module.removeprefix("llamaclust.")


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in report())
