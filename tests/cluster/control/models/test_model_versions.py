"""Changes of a model's version that do not succeed in time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import observations as seen
from llamaclust.cluster.control.model_versions import ModelVersions
from llamaclust.core.errors import DeadlineError
from support.several_models.runner import action_runner, observed_cluster


async def test_a_version_that_does_not_serve_in_time_is_given_up() -> None:
    """As while an epoch of before retires."""
    observed = observed_cluster()
    runner = action_runner(observed, lambda: None)
    added: list[Any] = []
    epochs: Any = SimpleNamespace(add_version=added.append)
    runner.epochs = epochs
    versions = ModelVersions(runner, deadline_s=0.01)
    model: Any = SimpleNamespace(model_id="n")
    for _ in range(2):
        with pytest.raises(DeadlineError, match=r"new adapters within 0\.01 s"):
            await versions.replace(model)
        assert await observed.next(None) == seen.VersionWanted("n")
        assert await observed.next(None) == seen.VersionWanted("m")
    assert added == [model, model]
