"""Generates README.md of the chart from the comments in values.yaml, and the `config` part of values.schema.json from
the cluster file's classes. Run it after a change of the comments or the classes. Tests fail if the files are old."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamaclust.cluster.config.cluster_config import ClusterConfig

CHART = Path(__file__).parent / "llamaclust"
OWNED = (
    "name",
    "model",
    "models",
    "launcher",
    "listen",
    "listen_also",
    "listen_tls",
    "join",
    "lease",
    "insecure",
    "ray",
    "workers",
    "api_keys_file",
    "allowed_hosts",
    "state_dir",
)
"""Keys of the cluster file that the chart sets, so users cannot set them below `config`."""
_COMMENT = re.compile(r"^ *# -- (.*)$")
_LONGEST_DEFAULT = 60


@dataclass(frozen=True, slots=True)
class Value:
    name: str  # Path of the value, such as image.repository.
    default: Any
    meaning: str


def values(text: str) -> Iterator[Value]:
    """Yields all values in the text of values.yaml. Raises ValueError if a value has no comment."""
    lines = text.splitlines()
    yield from _below(yaml.compose(text), "", lines)


def _below(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        comment = _COMMENT.match(lines[key.start_mark.line - 1]) if key.start_mark.line else None
        if comment is not None:
            yield Value(name, yaml.safe_load(yaml.serialize(value)), comment[1])
        elif isinstance(value, yaml.MappingNode) and value.value:
            yield from _below(value, f"{name}.", lines)
        else:
            raise ValueError(f"values.yaml: {name} has no comment that begins with `# --`")


def _shown(default: Any) -> str:
    if default in ("", None):
        return ""
    text = json.dumps(default) if not isinstance(default, str) else default
    return f"`{text}`" if len(text) <= _LONGEST_DEFAULT else "see `values.yaml`"


def readme() -> str:
    """Returns the text of README.md: README.md.in, with the table of values in place of @VALUES@."""
    rows = [
        f"| `{value.name}` | {_shown(value.default)} | {value.meaning} |"
        for value in values((CHART / "values.yaml").read_text())
    ]
    table = "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])
    return (CHART / "README.md.in").read_text().replace("@VALUES@", table)


def _named_by(part: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Returns the definitions to which a part of a schema refers, directly or through other definitions."""
    found: dict[str, Any] = {}
    for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(part)):
        found |= {name: definitions[name]} | _named_by(definitions[name], definitions)
    return found


def schema() -> str:
    """Returns the text of values.schema.json, with the cluster file's current keys below `config`."""
    ours = json.loads((CHART / "values.schema.json").read_text())
    cluster = ClusterConfig.model_json_schema()
    keys = {key: part for key, part in cluster["properties"].items() if key not in OWNED}
    ours["properties"]["config"] = {"type": "object", "additionalProperties": False, "properties": keys}
    own = {name: part for name, part in ours["$defs"].items() if name.startswith("chart")}
    ours["properties"]["models"] = cluster["properties"]["models"]
    ours["$defs"] = own | _named_by([keys, ours["properties"]["models"]], cluster.get("$defs", {}))
    return json.dumps(ours, indent=2) + "\n"


if __name__ == "__main__":
    (CHART / "values.schema.json").write_text(schema())
    (CHART / "README.md").write_text(readme())
