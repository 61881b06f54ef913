"""Runs JSON-Schema-Test-Suite (draft 2020-12) against grammars: which schemas are accepted, and which instances match.

    python benchmarks/suites/schema_suite.py [--source jsonschema-4.26.0.tar.gz]

The suite is in the source package of `jsonschema`, which pip downloads unless --source is given. A grammar fixes the
order of properties, so a valid instance with another order is also tried in the schema's order."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

PACKAGE = "jsonschema==4.26.0"
_SUITE = "/json/tests/draft2020-12/"
_END = 256
BYTES = GrammarVocabulary(
    [*(bytes([byte]) for byte in range(256)), b"\xff<end>"], [_END], lambda text: [*text.encode()]
)


def source_package(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", "jsonschema", "--no-deps", "-d"]
    subprocess.run([*command, str(folder), PACKAGE], check=True)
    return next(folder.glob("*.tar.gz"))


def groups(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with tarfile.open(source) as archive:
        for member in sorted(archive.getmembers(), key=lambda entry: entry.name):
            if _SUITE in member.name and (file := archive.extractfile(member)) is not None:
                for group in json.load(file):
                    yield member.name.split(_SUITE)[1], group


def ordered(instance: Any, schema: Any) -> Any:
    if isinstance(instance, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [ordered(item, items) for item in instance]
    if not isinstance(instance, dict):
        return instance
    named = schema.get("properties", {}) if isinstance(schema, dict) else {}
    required = schema.get("required", []) if isinstance(schema, dict) else []
    names = [*(name for name in (*named, *required) if name in instance), *instance]
    return {name: ordered(instance[name], named.get(name)) for name in dict.fromkeys(names)}


def ends_here(grammar: Grammar, text: str) -> bool:
    matcher = GrammarMatcher(grammar, BYTES)
    try:
        matcher.take(text.encode())
        allowed = matcher.allowed()
    except LlamaclustError:
        return False
    return allowed is not None and bool(allowed[_END // 32] >> _END % 32 & 1)


def allows(grammar: Grammar, instance: Any) -> bool:
    return ends_here(grammar, json.dumps(instance, ensure_ascii=False, separators=(",", ":")))


def judge(group: dict[str, Any], counts: Counter[str]) -> Iterator[str]:
    schema = group["schema"]
    schema = {key: value for key, value in schema.items() if key != "$schema"} if isinstance(schema, dict) else schema
    counts["schemas"] += 1
    try:
        grammar = definitions.of_schema(schema, "schema")
        GrammarMatcher(grammar, BYTES)
    except LlamaclustError as error:
        counts["refused"] += 1
        yield f"refused: {error}"
        return
    for test in group["tests"]:
        instance = test["data"]
        found = allows(grammar, instance) or (test["valid"] and allows(grammar, ordered(instance, schema)))
        kind = "valid" if test["valid"] else "invalid"
        counts[kind] += 1
        if found != test["valid"]:
            counts[f"{kind}, judged wrongly"] += 1
            yield f"{kind}: {test['description']}: {json.dumps(instance)[:100]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="the source package of jsonschema")
    parser.add_argument("--verbose", action="store_true", help="show each difference")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        source = given.source or source_package(Path(folder))
        for file, group in groups(source):
            for difference in judge(group, counts):
                if given.verbose:
                    print(f"{file}: {group['description']}: {difference}")
    for name, count in counts.items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
