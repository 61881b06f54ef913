"""Tests of drafted tokens in the API: fields of requests, counts in replies and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.candidates import Candidate
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.scheduler.speculation.windows import RoundTimes
from support.clusters.served import MODEL, SETTINGS, ScriptedEngine, client, events_of, ids, make_app, real_engine, says
from support.plans.drafting import SaidDrafters

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "a"},
    "/v1/messages": {**CHAT, "max_tokens": 4, "model": MODEL},
}
PROMPT = "The quick brown fox"
TOKENS = 21


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, None),
        ({"speculative": True}, None),
        ({"speculative": {}}, None),
        ({"speculative": "on"}, None),
        ({"speculative": {"n_max": None}}, None),
        ({"speculative": False}, 0),
        ({"speculative": "off"}, 0),
        ({"speculative": 0}, 0),
        ({"speculative": 5}, 5),
        ({"speculative": {"n_max": 32}}, 32),
        ({"speculative.n_max": 3.0}, 3),
        ({"speculative": {"n_max": 7, "n_min": 1, "p_min": 0.7}}, 7),
    ],
)
async def test_each_endpoint_says_how_many_tokens_may_be_drafted(
    path: str, fields: dict[str, Any], most: int | None
) -> None:
    engine = ScriptedEngine(says("a"))
    async with client(make_app(engine)) as http:
        reply = await http.post(path, json={**ENDPOINTS[path], **fields})
    assert reply.status_code == 200, reply.text
    assert engine.submitted[0].max_drafted == most
    ignored = {name.strip() for name in reply.headers.get("X-Llamaclust-Ignored", "").split(",")}
    assert ignored == ({"speculative.n_min", "speculative.p_min"} if "n_min" in str(fields) else {""})


async def test_options_of_ollama_say_it_too() -> None:
    engine = ScriptedEngine(says("a"))
    async with client(make_app(engine)) as http:
        body = {"model": MODEL, "prompt": "a", "options": {"speculative": {"n_max": 2}}}
        assert (await http.post("/api/generate", json=body)).status_code == 200
    assert engine.submitted[0].max_drafted == 2


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (33, "33"),
        (-1, "-1"),
        (1.5, "1.5"),
        ({"n_max": 64}, "64"),
        ({"n_max": "x"}, "'x'"),
        ({"n_max": {"n_max": 3}}, "n_max: a section of keys"),
        ({"n_max": False}, "n_max: false"),
        ("yes", "'yes'"),
        ([], "[]"),
    ],
)
async def test_other_values_are_refused(path: str, value: Any, shown: str) -> None:
    """Checks that the error names the field and all possible values."""
    for name in ("speculative", "speculative.n_max"):
        async with client(make_app(ScriptedEngine(says("a")))) as http:
            reply = await http.post(path, json={**ENDPOINTS[path], name: value})
        assert reply.status_code == 400
        told = f'{shown} is not possible; give true, false, a number of drafted tokens from 0 to 32, or {{"n_max": '
        assert reply.json()["error"]["message"].startswith(f"{name}: {told}")


class Known:
    """A drafter of a known text or of a text that differs from it in each token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.is_right = True

    def says(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        following = self.tokens[len(tokens) : len(tokens) + most]
        return tuple(token if self.is_right else (token + 1) % SETTINGS.vocabulary for token in following)


def whole_drafts(candidates: Sequence[Candidate], times: RoundTimes, groups: int, rows: int) -> list[int]:
    return [min(len(each.tokens), rows) for each in candidates]


def values(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if "spec_decode" in line and line[0] != "#")
    return {name: float(value) for name, value in pairs}


async def test_replies_and_metrics_count_drafted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "best_windows", whole_drafts)
    monkeypatch.setattr(speculation, "best_chain", lambda *given: None)
    known = Known()
    settings = replace(SETTINGS, speculation=SpeculationSettings(SaidDrafters(known.says), 4))
    body = {"prompt": PROMPT, "n_predict": TOKENS, "seed": 5, "ignore_eos": True, "return_tokens": True}
    async with real_engine(settings) as (engine, _), client(make_app(engine)) as http:

        async def complete(**more: Any) -> dict[str, Any]:
            reply = await http.post("/completion", json={**body, **more})
            assert reply.status_code == 200, reply.text
            return dict(reply.json())

        plain = await complete(speculative=False)
        assert "draft_n" not in plain["timings"] and plain["generation_settings"]["speculative.n_max"] == 0
        known.tokens = [*ids(PROMPT), *plain["tokens"]]
        fast = await complete()
        assert fast["tokens"] == plain["tokens"] and fast["generation_settings"]["speculative.n_max"] == 4
        drafted = fast["timings"]["draft_n"]
        assert 0 < drafted == fast["timings"]["draft_n_accepted"] and TOKENS / 5 <= TOKENS - drafted < TOKENS / 2
        narrow = await complete(speculative={"n_max": 1})
        assert narrow["tokens"] == plain["tokens"] and narrow["generation_settings"]["speculative.n_max"] == 1
        assert 0 < narrow["timings"]["draft_n"] <= TOKENS / 2
        known.is_right = False
        slow = await complete()
        assert slow["tokens"] == plain["tokens"]
        assert slow["timings"]["draft_n"] > 0 == slow["timings"]["draft_n_accepted"]

        counted = [reply["timings"] for reply in (fast, narrow, slow)]
        total, right = (sum(each[name] for each in counted) for name in ("draft_n", "draft_n_accepted"))
        shown = values((await http.get("/metrics")).text)
        for prefix in ("llamacpp:spec_decode_num", "llamaclust_spec_decode"):
            assert shown[f"{prefix}_draft_tokens_total"] == total
            assert shown[f"{prefix}_accepted_tokens_total"] == right
            assert total / 4 <= shown[f"{prefix}_drafts_total"] < total
        speed = engine.metrics.speed()
        assert (speed.drafted_tokens, speed.accepted_tokens) == (total, right)
        for name, key, of_all in (("draft", "drafted_tokens", total), ("accepted", "accepted_tokens", right)):
            by_kind = {kind: each[key] for kind, each in speed.drafts.items()}
            assert sum(by_kind.values()) == of_all and by_kind.keys() <= {"ngram", "shared", "model", "mtp", "forced"}
            for kind, tokens in by_kind.items():
                assert shown[f'llamaclust_spec_decode_{name}_tokens_by_kind_total{{kind="{kind}"}}'] == tokens
        [*_, last] = (await http.get("/cluster/requests")).json()["requests"]
        assert (last["drafted_tokens"], last["accepted_tokens"]) == (slow["timings"]["draft_n"], 0)


async def test_timings_of_choices_have_drafted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "best_windows", whole_drafts)
    monkeypatch.setattr(speculation, "best_chain", lambda *given: None)
    known = Known()
    settings = replace(SETTINGS, speculation=SpeculationSettings(SaidDrafters(known.says), 4))
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "seed": 5, "ignore_eos": True, "return_token_ids": True}
    async with real_engine(settings) as (engine, _), client(make_app(engine)) as http:
        [plain] = (await http.post("/v1/completions", json=body)).json()["choices"]
        assert plain["timings"]["drafted_tokens"] == 0
        known.tokens = [*plain["prompt_token_ids"], *plain["token_ids"]]
        [choice] = (await http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["token_ids"] == plain["token_ids"]
        assert 0 < choice["timings"]["drafted_tokens"] == choice["timings"]["accepted_tokens"]
        streamed = await http.post("/v1/completions", json={**body, "stream": True, "timings_per_token": True})
        counts = [event["timings"].get("draft_n", 0) for event in events_of(streamed.text)[:-1] if "timings" in event]
        assert counts == sorted(counts) and counts[-1] == choice["timings"]["drafted_tokens"]


async def test_slots_and_properties_say_whether_tokens_are_drafted() -> None:
    for own, expected in ((SpeculationSettings(SaidDrafters(lambda tokens, most: ()), 4), True), (None, False)):
        async with real_engine(replace(SETTINGS, speculation=own)) as (engine, _), client(make_app(engine)) as http:
            assert {slot["speculative"] for slot in (await http.get("/slots")).json()} == {expected}
            assert (await http.get("/props")).json()["default_generation_settings"]["speculative"] is expected
