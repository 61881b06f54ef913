"""What the engines of one or several models say of themselves: `GET /cluster/requests`, `GET /cluster/requests/ID`,
`GET /metrics`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from llamaclust.cluster.api.error_responses import JsonResponse
from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.llamacpp.metrics import llamacpp_metrics
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.metrics import CONTENT_TYPE
from llamaclust.cluster.engine.model_metrics import render_all
from llamaclust.cluster.engine.waterfall_json import matching, summary_json, waterfall_json
from llamaclust.cluster.engine.waterfalls import RequestRecord
from llamaclust.cluster.state.adapters import ServedAdapters

_MOST_SEQUENCES = 32
"""Of one request, that are shown."""


@dataclass(frozen=True, slots=True)
class ReadModel:
    """One that is read. `adapters`: that its requests use."""

    name: str
    engine: Engine
    adapters: ServedAdapters

    def adapter_names(self, record: RequestRecord) -> dict[int, str]:
        return self.adapters.names_at(record.waterfall.start_ns)


def requests_reply(models: Sequence[ReadModel]) -> Response:
    """The requests that are open, and the last ones that ended, the oldest first."""
    found = [(model, record) for model, records in _records(models) for record in records]
    found.sort(key=lambda each: _order(each[1]))
    return _reply([(model, summary_json(record, model.adapter_names(record))) for model, record in found])


def waterfall_reply(models: Sequence[ReadModel], name: str) -> Response:
    """Where the time of a request went: each of its sequences, without any of its text. HttpError 404 for no request of
    any model."""
    known = _records(models)
    found = [(model, record) for model, records in known for record in matching(records, name)]
    if not found:
        message = f"no request {name[:80]!r} is open or among the last {sum(len(records) for _, records in known)}"
        raise HttpError(404, "request_not_found", message)
    return _reply(
        [(model, waterfall_json(record, model.adapter_names(record))) for model, record in found[-_MOST_SEQUENCES:]]
    )


def metrics_reply(models: Sequence[ReadModel], started_s: int) -> Response:
    """Prometheus: this program's metrics, and those that have names in llama.cpp. The model is a label where there are
    several. `started_s`: Unix time of the server's start."""
    engines = {model.name: model.engine for model in models}
    metrics = {model: engine.metrics for model, engine in engines.items()}
    own = render_all(metrics) if len(metrics) > 1 else b"".join(each.render() for each in metrics.values())
    headers = {"Process-Start-Time-Unix": str(started_s)}
    return Response(own + llamacpp_metrics(engines), media_type=CONTENT_TYPE, headers=headers)


def _records(models: Sequence[ReadModel]) -> list[tuple[ReadModel, list[RequestRecord]]]:
    """The oldest of each model first."""
    now_ns = time.monotonic_ns()
    return [(model, model.engine.waterfalls.records(now_ns)) for model in models]


def _order(record: RequestRecord) -> tuple[bool, float]:
    """What ended, by its end; then what is open, as each model has it."""
    is_open = record.end is None
    return is_open, 0.0 if is_open else record.waterfall.start_ns / 1e9 + record.seconds


def _reply(found: Sequence[tuple[ReadModel, dict[str, Any]]]) -> Response:
    return JsonResponse({"requests": [{"model": model.name, **fields} for model, fields in found]})
