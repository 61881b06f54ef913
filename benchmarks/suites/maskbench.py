"""Runs MaskBench: real JSON schemas with valid and invalid instances, against the grammars that requests use.

    python benchmarks/suites/maskbench.py FOLDER [--sample 1000] [--seed 1] [--verbose]

FOLDER is `maskbench/data` in a checkout of guidance-ai/jsonschemabench. Instances are matched byte by byte. A schema
passes if it is accepted and all of its instances are judged right."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from schema_suite import BYTES, ends_here

from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher

_SHOWN_S = 10.0


def judge(document: dict[str, Any], counts: Counter[str]) -> Iterator[str]:
    counts["schemas"] += 1
    try:
        grammar = definitions.of_schema(document["schema"], "schema")
        GrammarMatcher(grammar, BYTES)
    except LlamaclustError as error:
        counts["schemas, refused"] += 1
        yield f"refused: {error}"
        return
    differences = [*_differences(grammar, document["tests"], counts)]
    counts["schemas, passed"] += not differences
    yield from differences


def _differences(grammar: Grammar, tests: list[dict[str, Any]], counts: Counter[str]) -> Iterator[str]:
    for test in tests:
        kind = "valid" if test["valid"] else "invalid"
        counts[f"{kind} instances"] += 1
        text = json.dumps(test["data"], ensure_ascii=False)
        if ends_here(grammar, text) != test["valid"]:
            counts[f"{kind} instances, judged wrongly"] += 1
            yield f"{kind}: {text[:100]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, help="number of random schemas (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="show each difference")
    given = parser.parse_args()
    paths = sorted(given.folder.glob("*.json"))
    if not paths:
        raise SystemExit(f"skipped: {given.folder} contains no schemas")
    if given.sample:
        paths = Random(given.seed).sample(paths, min(given.sample, len(paths)))
    counts: Counter[str] = Counter()
    shown_s = time.monotonic()
    for number, path in enumerate(paths):
        for difference in judge(json.loads(path.read_text()), counts):
            if given.verbose:
                print(f"{path.stem}: {difference}")
        if time.monotonic() - shown_s > _SHOWN_S:
            shown_s = time.monotonic()
            print(f"{number} of {len(paths)}", file=sys.stderr, flush=True)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
