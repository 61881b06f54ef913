"""Runs a benchmark case, whose variants take turns. Prints medians, minima, maxima and ratios.

    python benchmarks/run.py CASE [options]        # --help: the options of a case
    python benchmarks/run.py CASE [options] --rounds 9 --json FILE --against CHECKOUT

With `--against`, the case runs in this checkout and in CHECKOUT in turns. CHECKOUT must be built already."""

from __future__ import annotations

import argparse
import ast
import asyncio
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(FOLDER), str(FOLDER.parent / "tests")) if path not in sys.path]

from llamaclust.wire.rpc.grpc_options import tune_grpc  # noqa: E402

tune_grpc()

from runner.against import Against, serve  # noqa: E402
from runner.case import Case  # noqa: E402
from runner.options import positive  # noqa: E402
from runner.turns import Turns  # noqa: E402

from llamaclust.cli.interrupts import ends_in_one_line  # noqa: E402

CASES = {path.stem: path for path in sorted(FOLDER.glob("cases/*/*.py"))}


def case_of(name: str) -> type[Case]:
    module = import_module(".".join(CASES[name].relative_to(FOLDER).with_suffix("").parts))
    (found,) = (each for each in vars(module).values() if isinstance(each, type) and _is_case(each, module.__name__))
    return found


def _is_case(each: type, module: str) -> bool:
    return issubclass(each, Case) and each.__module__ == module


def parser_of(name: str, case: type[Case]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"run.py {name}", description=case.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = [field for field in fields(case) if field.init]  # type: ignore[arg-type]
    for field in options:
        given: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "type": field.metadata["type"]}
        if "option" not in field.metadata:
            given["nargs"] = field.metadata["nargs"] or ("?" if field.default is not MISSING else None)
            given["default"] = None if field.default is MISSING else field.default
            parser.add_argument(field.name, **given)
        elif field.default is False:
            parser.add_argument(_flag(field.name), action="store_true", help=given["help"])
        else:
            shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            given["help"] += f" (default: {shown})" if shown not in (None, "") else ""
            parser.add_argument(_flag(field.name), default=field.default, **given)
    parser.add_argument("--rounds", type=positive, help=f"number of turns (default: {case.rounds})")
    parser.add_argument("--json", type=Path, help="append a JSON line to this file for each turn and variant")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="folder of a built checkout to run the case in, too, in turns"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def listing() -> str:
    lines = []
    for name, path in CASES.items():
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        says = [ast.get_docstring(node) or "" for node in classes if any(map(_names_case, node.bases))]
        lines += [f"  {name:16} {text.splitlines()[0]}" for text in says if text]
    return "\n".join(lines)


def _names_case(base: ast.expr) -> bool:
    return isinstance(base, ast.Name) and base.id == "Case"


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in CASES:
        is_help = arguments[:1] in (["--help"], ["-h"])
        print(
            f"usage: run.py CASE [options]\n\n{__doc__}\n\nCases:\n{listing()}",
            file=sys.stdout if is_help else sys.stderr,
        )
        raise SystemExit(0 if is_help else 2)
    kind = case_of(arguments[0])
    given = vars(parser_of(arguments[0], kind).parse_args(arguments[1:]))
    rounds, json, tree, serves = (given.pop(name) for name in ("rounds", "json", "against", "serve"))
    case = kind(**given)
    if serves:
        asyncio.run(serve(case))
        return
    if tree is not None:
        place = next(at for at, word in enumerate(arguments) if word.startswith("--against"))
        rest = [*arguments[:place], *arguments[place + (1 if "=" in arguments[place] else 2) :]]
        case = Against(tree, rest, rounds or kind.rounds)
        rounds = case.rounds_of_case
    asyncio.run(Turns(case, rounds, json).run())


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
