"""Whether calls obey a grammar is decided once: the time of a processor does not change tokens after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.api.replies.ticket import Constraint
from llamaclust.cluster.state.instants import Instant
from llamaclust.cluster.state.journal_records import read_journal
from llamaclust.cluster.text.chat import ChatRequest
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService, TokenizedRequest
from llamaclust.core.errors import WorkerError
from llamaclust.core.sampling import Grammar
from support.clusters.resumable import KEY, PATHS, KilledJournal, body_of, served, stream

GRAMMAR = Grammar("{}", "tools")


def test_the_first_decision_counts() -> None:
    free, bound = CompletionRequest("a"), CompletionRequest("a", grammar=GRAMMAR)
    constraint = Constraint()
    assert constraint.kept(free) == free and constraint.kept(bound) == free
    constraint = Constraint()
    assert constraint.kept(bound) == bound
    with pytest.raises(WorkerError, match="could not be made in time again"):
        constraint.kept(free)


@pytest.mark.parametrize("is_constrained", [True, False])
async def test_a_restored_chat_has_the_grammar_of_its_first_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_constrained: bool
) -> None:
    decisions, used = [is_constrained], list[Grammar | None]()
    chat, prepare = TextService.chat, TextService.prepare

    async def deciding(service: TextService, request: ChatRequest) -> CompletionRequest:
        return replace(await chat(service, request), grammar=GRAMMAR if decisions[-1] else None)

    async def seeing(service: TextService, request: CompletionRequest) -> TokenizedRequest:
        used.append(request.grammar)
        return await prepare(service, replace(request, grammar=None))

    monkeypatch.setattr(TextService, "chat", deciding)
    monkeypatch.setattr(TextService, "prepare", seeing)
    path = tmp_path / "journal"
    async with served(path, KilledJournal) as server:
        await stream(server.http, "POST", PATHS[1], json=body_of(PATHS[1]), headers=KEY)
    (left,) = read_journal(path, Instant.now())
    assert left.admission.is_constrained == is_constrained
    decisions.append(not is_constrained)
    async with served(path) as server:
        events = await stream(server.http, "GET", "/v1/streams/one")
    if is_constrained:
        assert "could not be made in time again" in str(events) and used == [GRAMMAR]
    else:
        assert events[-1][1] == "[DONE]" and used == [None, None]
