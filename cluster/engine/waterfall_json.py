"""Converts waterfalls (time lines) to JSON for `GET /cluster/requests`. A phase's parts add up to its seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.engine.waterfall import WaterfallPhase
from llamaclust.cluster.engine.waterfalls import RequestRecord

SHOWN_CHARACTERS = 8
"""Number of characters of a request's id that are shown. Other users must not learn the rest."""

_ID = re.compile(r"[0-9a-f]{4,}")


def matching(records: list[RequestRecord], name: str) -> list[RequestRecord]:
    """Returns the records of a request. `name` must contain at least the first 4 digits of the request's id."""
    if not (found := _ID.findall(name)):
        return []
    beginning = max(found, key=len)[:SHOWN_CHARACTERS]
    return [record for record in records if record.request_id.startswith(beginning)]


def summary_json(record: RequestRecord, adapters: Mapping[int, str]) -> dict[str, Any]:
    """Converts a record to JSON without its phases. `adapters` maps adapter numbers to names."""
    timings = record.timings
    return {
        "id": record.request_id[:SHOWN_CHARACTERS],
        "end": record.end,
        "seconds": record.seconds,
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "generated_tokens": timings.generated_tokens,
        "drafted_tokens": timings.drafted_tokens,
        "accepted_tokens": timings.accepted_tokens,
        "adapters": [{"name": adapters.get(number), "scale": scale} for number, scale in record.adapters],
    }


def waterfall_json(record: RequestRecord, adapters: Mapping[int, str]) -> dict[str, Any]:
    waterfall = record.waterfall
    phases = [_phase(phase, waterfall.start_ns) for phase in waterfall.phases]
    return {**summary_json(record, adapters), "phases": phases}


def _phase(phase: WaterfallPhase, start_ns: int) -> dict[str, Any]:
    times = {"phase": str(phase.kind), "start": (phase.start_ns - start_ns) / 1e9, "seconds": phase.ns / 1e9}
    if not phase.microbatches:
        return times
    return times | {
        "tokens": phase.tokens,
        "microbatches": phase.microbatches,
        "stages": [_stage(phase, index, stage) for index, stage in enumerate(phase.stages)],
        "links": phase.links_ns / 1e9,
        "idle": phase.idle_ns / 1e9,
    }


def _stage(phase: WaterfallPhase, index: int, stage: StageInfo) -> dict[str, Any]:
    compute, queue, wire = (ns / 1e9 for ns in phase.stage_ns(index))
    return {"worker": stage.worker, "layers": list(stage.layers), "compute": compute, "queue": queue, "send": wire}
