"""The `why` command: shows the phases of a request and their times in lines of 80 columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any

from typer import Argument

from llamaclust.cli import terminal
from llamaclust.cli.drafts import accepted_text
from llamaclust.cli.options import CaFile, Cluster, Endpoint, Json, KeyFile
from llamaclust.core.errors import UsageError

Request = Annotated[
    str | None,
    Argument(metavar="REQUEST", help="A request's id, or at least its first 4 characters. Default: list the requests."),
]
_SINGULAR = {"tokens": "token", "microbatches": "microbatch"}
Record = dict[str, Any]

_LEAST_CHARACTERS = 4
_LABEL, _BAR = 44, 19
_SHOWN = 20
"""Maximum number of requests that `why` lists without a request id."""
_LEAST = 0.005
"""A part of a phase is shown if it took at least this share of the phase's time."""


def why(
    request: Request = None,
    cluster: Cluster = None,
    as_json: Json = False,
    endpoint: Endpoint = None,
    api_key_file: KeyFile = None,
    ca_file: CaFile = None,
) -> None:
    """Show where the time of a request went: waiting, prefill, decode, stages, links, recoveries."""
    from llamaclust.cli.status import Watched, group_lines

    if request is not None and len(request) < _LEAST_CHARACTERS:
        raise UsageError(f"{request!r} is too short for a request's id: give at least {_LEAST_CHARACTERS} characters")
    groups: list[Record] = []
    with Watched.find(cluster, endpoint, api_key_file, ca_file).api as api:
        records = api.requests() if request is None else api.waterfall(request)
        if request is not None and records and not as_json:
            groups = api.status(records[0]["model"]).get("groups", [])
    if as_json:
        print(json.dumps({"requests": records}))
        return
    if request is None:
        lines = list_lines(records)
    else:
        waterfalls = (line for record in records for line in waterfall_lines(record))
        lines = chain(waterfalls, _gather_lines(group_lines(_of_stages(groups, records))))
    for line in lines:
        print(terminal.printable(line))


def list_lines(records: list[Record]) -> Iterator[str]:
    if not records:
        yield "no request yet"
    with_model = len({record["model"] for record in records}) > 1
    for record in records[-_SHOWN:]:
        adapters = f", adapters: {_adapters(record)}" if record["adapters"] else ""
        yield f"{_head(record, with_model=with_model)}{adapters}"


def _head(record: Record, *, with_model: bool) -> str:
    cached = f" ({record['cached_tokens']} cached)" if record["cached_tokens"] else ""
    generated = "" if record["end"] == "embedded" else f", {record['generated_tokens']} generated"
    if record.get("drafted_tokens"):
        generated += f" ({accepted_text(record['accepted_tokens'], record['drafted_tokens'])})"
    model = f"{record['model']}: " if with_model else ""
    prompt = record["prompt_tokens"]
    tokens = f"{model}{prompt} prompt {'token' if prompt == 1 else 'tokens'}{cached}{generated}"
    return f"{record['id']}: {tokens}, {record['end'] or 'running'}, {_duration(record['seconds'])}"


def _adapters(record: Record) -> str:
    return ", ".join(f"{adapter['name']} {adapter['scale']:g}" for adapter in record["adapters"])


def waterfall_lines(record: Record) -> Iterator[str]:
    yield _head(record, with_model=False)
    if record["adapters"]:
        yield f"adapters: {_adapters(record)}"
    whole = max(record["seconds"], 1e-9)
    for phase in record["phases"]:
        count = f", {_count(phase, 'tokens')} in {_count(phase, 'microbatches')}" if "tokens" in phase else ""
        line = _row(f"{phase['phase']}{count}", phase["seconds"], whole)
        yield f"{line} |{_bar(phase['start'] / whole, phase['seconds'] / whole)}|"
        for label, seconds in _parts(phase):
            if seconds >= _LEAST * phase["seconds"]:
                yield _row(f"  {label}", seconds, whole)


def _of_stages(groups: list[Record], records: list[Record]) -> list[Record]:
    phases = [phase for record in records for phase in record["phases"]]
    leaders = {stage["worker"] for phase in phases for stage in phase.get("stages", ())}
    return [group for group in groups if group["members"][0]["worker"] in leaders]


def _gather_lines(lines: Iterator[str]) -> Iterator[str]:
    """Adds a heading to lines about gathers (exchanges of rows in a group)."""
    for index, line in enumerate(lines):
        if index == 0:
            yield "compute includes time in gathers; since the plan, over all requests:"
        yield f"  {line}"


def _count(phase: Record, what: str) -> str:
    return f"{phase[what]} {what if phase[what] != 1 else _SINGULAR[what]}"


def _parts(phase: Record) -> Iterator[tuple[str, float]]:
    for stage in phase.get("stages", ()):
        for part, label in (("compute", "compute"), ("queue", "other microbatches"), ("send", "send")):
            yield f"{stage['worker']}: {label}", stage[part]
    yield "links and coordinator", phase.get("links", 0.0)
    yield "idle between microbatches", phase.get("idle", 0.0)


def _row(label: str, seconds: float, whole: float) -> str:
    name = label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"
    return f"{name:<{_LABEL}}{_duration(seconds):>9}{seconds / whole:>5.0%}"


def _bar(start: float, share: float) -> str:
    """Returns a bar of at least one `#`. The arguments are fractions of the full width."""
    begin = min(round(start * _BAR), _BAR - 1)
    length = max(1, min(round(share * _BAR), _BAR - begin))
    return f"{' ' * begin}{'#' * length}".ljust(_BAR)


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
