"""Checks that `api.defaults` is validated before a cluster starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.front.dialects.llamacpp.endpoints import AllScales
from llamaclust.cluster.front.dialects.llamacpp.slots import SlotBody
from llamaclust.cluster.front.dialects.ollama.schema import CopyBody, CreateBody, DeleteBody, PullBody, ShowBody
from llamaclust.cluster.front.http.responses import Route
from llamaclust.cluster.front.models import LoadAdapterBody, UnloadAdapterBody
from llamaclust.cluster.server.front import BODIES, api_settings, check_defaults
from llamaclust.core.errors import UsageError
from support.clusters.served import ScriptedEngine, make_app, says

NO_DEFAULTS: dict[type[BaseModel], str] = {
    AllScales: "is a list of adapters' scales for all requests",
    SlotBody: "names a file",
    LoadAdapterBody: "names an adapter",
    UnloadAdapterBody: "names an adapter",
    ShowBody: "names a model",
    PullBody: "names a model",
    CreateBody: "names a model",
    CopyBody: "names a model",
    DeleteBody: "names a model",
}
"""Bodies that `api.defaults` does not apply to, and why."""


def test_every_endpoint_with_a_body_takes_part_or_has_a_reason() -> None:
    bodies = [*BODIES, *NO_DEFAULTS]
    app = make_app(ScriptedEngine(says("a")), slot_folder=Path("/tmp"), allows_pull=True)
    given = {route.path: route.body for route in app.routes if isinstance(route, Route) and route.body}
    assert [path for path, body in given.items() if body not in bodies] == []
    assert [body for body in bodies if body not in given.values()] == []


@pytest.mark.parametrize(
    "defaults",
    [
        {},
        {"temperature": 0.7, "seed": 1},
        {"n_predict": 3, "logprobs": 2},
        {"logprobs": True, "repetition_penalty": 1.5, "max_tokens": 5},
        {"reasoning_budget": -1, "pooling": "mean", "top_n": 3},
        {"num_predict": 5, "temperature": None},
    ],
)
def test_fields_of_any_endpoint_are_taken(defaults: dict[str, Any]) -> None:
    check_defaults(defaults)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"temprature": 1}, "api.defaults: no endpoint has a field 'temprature'; did you mean 'temperature'?"),
        ({"zzzzzz": 1}, "api.defaults: no endpoint has a field 'zzzzzz'; remove it"),
        ({"reasoning_budget": -5}, "api.defaults: reasoning_budget: "),
        ({"seed": 1, "temperature": "warm"}, "api.defaults: temperature: input should be a valid number"),
    ],
)
def test_others_are_refused_at_the_start(defaults: dict[str, Any], message: str) -> None:
    values = {"model": "m", "workers": [{"name": "a"}], "api": {"defaults": defaults}}
    with pytest.raises(UsageError) as caught:
        api_settings(ClusterConfig.model_validate(values))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
