"""llama.cpp's chat templates and the messages that its tests expect, run through our parser: whole and in pieces.

    python benchmarks/models/tool_calls.py [--source FOLDER] [--chunkings 10000]

The source is that of `LLAMACLUST_LLAMA_CPP`, or fetched by its package into the cache, some 60 MB."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from llamaclust.model.chat.tools.events import AnswerEvent, merged
from support.chat.llama_cpp_cases import Case, read_cases
from support.chat.llama_cpp_runner import Template, case_events, load_template, run_case
from support.chat.llama_cpp_source import PACKAGE, fetch_source, find_source
from support.seed import SEED

_MAX_PIECES = 40


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--source", type=Path, help="llama.cpp's folder")
    options.add_argument("--chunkings", type=int, default=10_000, help="random ones, over all cases")
    arguments = options.parse_args()
    source = arguments.source or find_source() or fetch_source()
    cases = [(_template(source, case), case) for case in read_cases(source / "tests" / "test-chat.cpp")]
    failed = 0
    for template, case in cases:
        difference = run_case(template, case)
        failed += bool(difference)
        if difference:
            print(f"{case.template}:{case.line}: {difference}")
    templates = {case.template for _, case in cases}
    share = 1 - failed / len(cases)
    print(f"{PACKAGE}: {len(cases) - failed} of {len(cases)} cases, {len(templates)} templates ({share:.1%})")
    unequal = _unequal_chunkings(cases, arguments.chunkings)
    print(f"seed {SEED}: {unequal} of {arguments.chunkings} random chunkings differ from the whole text")


def _template(source: Path, case: Case) -> Template:
    return load_template(source / "models" / "templates" / case.template)


def _unequal_chunkings(cases: list[tuple[Template, Case]], count: int) -> int:
    draw = random.Random(SEED)
    wholes: dict[int, list[AnswerEvent]] = {}
    unequal = 0
    for place in range(count):
        number = place % len(cases)
        template, case = cases[number]
        if number not in wholes:
            wholes[number] = merged(case_events(template, case, [case.text]))
        cuts = sorted(draw.choices(range(len(case.text) + 1), k=draw.randint(0, _MAX_PIECES)))
        pieces = [case.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(case.text)], strict=True)]
        unequal += merged(case_events(template, case, pieces)) != wholes[number]
    return unequal


if __name__ == "__main__":
    main()
