"""Checks that requests that the end of a coordinator aborts still have spans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.server import serve
from llamaclust.cluster.server.telemetry.settings import Target, TelemetrySettings
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import SupersededError


async def test_telemetry_is_open_until_the_apis_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    @asynccontextmanager
    async def noted(name: str, value: object) -> AsyncIterator[Any]:
        try:
            yield value
        finally:
            ended.append(name)

    def superseded(*_: object) -> None:
        raise SupersededError("another coordinator serves")

    monkeypatch.setattr(serve, "open_telemetry", lambda *_: noted("telemetry", None))
    monkeypatch.setattr(serve, "api_models", lambda *_: noted("apis", []))
    monkeypatch.setattr(serve, "create_app", superseded)
    config = ClusterConfig.model_validate({"model": "m.gguf", "workers": [{"name": "a"}]})
    pool, metrics = SimpleNamespace(operations=None), CollectorRegistry()
    cluster: Any = SimpleNamespace(config=config, record=ControlRecord(), models=(), metrics=metrics, pool=pool)
    telemetry = TelemetrySettings(traces=Target("http://127.0.0.1:1/v1/traces"), metrics=None)
    signals: Any = None  # not used before requests are served
    front: Any = SimpleNamespace(settings=ApiSettings(), telemetry=telemetry, record=None)
    with pytest.raises(SupersededError):
        await serve._answer(cluster, ClusterDir(tmp_path), front, signals)
    assert ended == ["apis", "telemetry"]
