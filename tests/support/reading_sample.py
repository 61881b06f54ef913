"""Prints random texts of this project, mixed with texts of other projects, for a reader who marks unclear texts.

    python tests/support/reading_sample.py [SEED] [--key]

40 docstrings (each with its signature), 20 help texts and 20 error messages of this project are shuffled with those
of installed packages. `--key` prints the numbers of this project's texts instead."""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
OWN = [ROOT / name for name in ("cli", "cluster", "core", "kernels", "model", "tools", "wire", "worker")]
_NAMES = ("anyio", "click", "fsspec", "grpc", "httpx", "huggingface_hub", "ray", "starlette", "typer", "uvicorn")
OTHERS = [Path(click.__file__).parents[1] / name for name in _NAMES]
_MOST_FILES = 250
"""Maximum number of files that are read of each other package, so that no package outweighs the others."""
_SHORT, _LONG = 30, 500


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            text := ast.get_docstring(node)
        ):
            yield f"{signature(node)}\n    {flat(text)}"


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"def {node.name}({ast.unparse(node.args)}){result}"


def help_texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            if keyword.arg == "help" and isinstance(keyword.value, ast.Constant | ast.JoinedStr):
                yield f"help: {constant(keyword.value)}"


def errors(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = [each for each in node.exc.args if isinstance(each, ast.Constant | ast.JoinedStr)]
            if texts:
                yield f"error: {': '.join(map(constant, texts))}"


def constant(text: ast.Constant | ast.JoinedStr) -> str:
    """Returns a text with its expressions in braces."""
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return flat(
        "".join(
            f"{{{ast.unparse(each.value)}}}" if isinstance(each, ast.FormattedValue) else str(each.value)
            for each in parts
            if isinstance(each, ast.FormattedValue | ast.Constant)
        )
    )


def flat(text: str) -> str:
    return " ".join(text.split())


Find = Callable[[ast.Module], Iterator[str]]


def found(folders: list[Path], find: Find) -> list[str]:
    """Returns the texts of ordinary length of all files below the folders."""
    texts = list[str]()
    for folder in folders:
        paths = [path for path in sorted(folder.rglob("*.py")) if "_pb2" not in path.name]
        for path in paths if folder in OWN else paths[:_MOST_FILES]:
            texts += [text for text in find(ast.parse(path.read_text())) if _SHORT < len(text) < _LONG]
    return texts


def sample(seed: int) -> list[tuple[bool, str]]:
    """Returns texts in random order, with True for those of this project."""
    chance = random.Random(seed)
    chosen = list[tuple[bool, str]]()
    for find, count in ((docstrings, 40), (help_texts, 20), (errors, 20)):
        for is_own, folders in ((True, OWN), (False, OTHERS)):
            chosen += [(is_own, text) for text in chance.sample(found(folders, find), count)]
    chance.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--key", action="store_true")
    options = parser.parse_args()
    texts = sample(options.seed)
    if options.key:
        print(*(number for number, (is_own, _) in enumerate(texts, 1) if is_own))
    else:
        print(*(f"{number}. {text}" for number, (_, text) in enumerate(texts, 1)), sep="\n")


if __name__ == "__main__":
    main()
