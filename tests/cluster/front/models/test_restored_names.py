"""Tests of an earlier coordinator's requests whose model name now belongs to an adapter."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path

import pytest

from llamaclust.cluster.state.adapters import ServedAdapter, ServedAdapters
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext
from support.clusters.resumable import PATHS, SERVED, body_of, served, stream


@pytest.mark.parametrize("used", [False, True])
async def test_a_restored_request_does_not_go_on_with_an_adapter_that_it_did_not_use(
    used: bool, tmp_path: Path
) -> None:
    adapters = ServedAdapters()
    adapters.add(0, ServedAdapter("poet", "/poet.gguf", content="ab"))
    admission = RequestContext(
        id="0" * 24,
        seed=7,
        created=1,
        idempotency_key="key",
        endpoint=PATHS[0],
        body=json.dumps({**body_of(PATHS[0]), "model": "poet"}).encode(),
        admitted=Instant.now(),
        limit_s=1e9,
        served=SERVED,
        is_streamed=True,
        adapters=adapters.marks({0}) if used else (),
    )
    async with aclosing(Journal(tmp_path / "journal", ControlRecord(), 60.0)) as journal:
        await journal.admit(admission)
    async with served(tmp_path / "journal", adapters=adapters) as server:
        events = await stream(server.http, "GET", "/v1/streams/key")
    assert ("loaded under this name meanwhile" in str(events)) is not used, events
