"""`api.defaults` is checked before a cluster starts."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.server import serve
from llamaclust.cluster.server.default_fields import check_defaults
from llamaclust.core.errors import UsageError


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
        ({"temprature": 1}, "api.defaults: 'temprature' is a field of no endpoint; did you mean 'temperature'?"),
        ({"zzzzzz": 1}, "api.defaults: 'zzzzzz' is a field of no endpoint; leave it out"),
        ({"reasoning_budget": -5}, "api.defaults: reasoning_budget: "),
        ({"seed": 1, "temperature": "warm"}, "api.defaults: temperature: input should be a valid number"),
    ],
)
def test_others_are_refused_at_the_start(defaults: dict[str, Any], message: str) -> None:
    values = {"model": "m", "workers": [{"name": "a"}], "api": {"defaults": defaults}}
    with pytest.raises(UsageError) as caught:
        serve._api_settings(ClusterConfig.model_validate(values))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
