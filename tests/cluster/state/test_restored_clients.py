"""Checks that restored requests have the shares and turns of their clients, as before the restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext, read_journal
from support.clusters.resumable import KEY, PATHS, SERVED, KilledJournal, body_of, served, stream

CLIENTS = ["127.0.0.1", "10.0.0.7", "2001:db8::", "0123456789abcdef0123456789abcdef"]


def admission(number: int, client: str) -> RequestContext:
    return RequestContext(
        id=f"{number:024x}",
        seed=7,
        created=1,
        client=client,
        idempotency_key=f"key {number}",
        endpoint=PATHS[0],
        body=json.dumps(body_of(PATHS[0])).encode(),
        admitted=Instant.now(),
        limit_s=1e9,
        served=SERVED,
    )


async def test_a_client_without_a_key_is_known_by_its_address(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", KilledJournal) as server:
        await stream(server.http, "POST", PATHS[0], json=body_of(PATHS[0]), headers=KEY)
    (left,) = read_journal(tmp_path / "journal", Instant.now())
    assert (left.owner, left.client) == ("", "127.0.0.1")


async def test_restored_requests_have_the_shares_and_turns_of_their_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, prepare = tmp_path / "journal", list[str](), TextService.prepare

    async def seeing(service: TextService, request: CompletionRequest, leases: RowLeases) -> GenerationRequest:
        seen.append(current_owner.get())
        return await prepare(service, request, leases)

    monkeypatch.setattr(TextService, "prepare", seeing)
    journal = Journal(path, ControlRecord(), 60.0)
    for number, client in enumerate(CLIENTS):
        await journal.admit(admission(number, client))
    await journal.aclose()
    async with served(path) as server:
        assert server.replies.cache._held_bytes.held.keys() == set(CLIENTS)
        for number in range(len(CLIENTS)):
            await stream(server.http, "GET", f"/v1/streams/key {number}")
    assert sorted(seen) == sorted(CLIENTS)
