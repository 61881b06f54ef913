"""Checks that replies of many tokens and logprobs are bounded before admission and rendered off the event loop."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.front import json_text
from llamaclust.cluster.front.dialects.openai import view as view_module
from llamaclust.cluster.front.dialects.openai.view import OpenAiView, completion_logprobs
from llamaclust.cluster.front.json_text import JsonBody, json_body, json_parts, to_json
from llamaclust.cluster.front.text import sharing
from llamaclust.cluster.front.text.embedder import Rank
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.server.serve import serve
from llamaclust.core.errors import ParameterError, QueueFullError
from llamaclust.model.ranking import Ranking
from llamaclust.model.tokenizers.pairs import PairForm
from support.clusters import served as served_apps
from support.clusters.resumable import KEY, PATHS, body_of, served
from support.clusters.served import ScriptedEngine, client, events_of, make_app, make_service, real_engine, says, until

SCORED: dict[str, Any] = {"prompt": [[5] * 150] * 64, "max_tokens": 49, "echo": True, "logprobs": 128}
"""A request for 64 x (149 + 49) x 129 entries."""

_LOGPROBS = "message.output_text.logprobs"
_CHAT = {"logprobs": True, "top_logprobs": 9, "max_tokens": 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_cannot_be_held_is_refused_by_arithmetic(stream: bool) -> None:
    engine = ScriptedEngine(says("a"))
    async with client(make_app(engine)) as http:
        refused = await http.post("/v1/completions", json={**SCORED, "n": 2, "stream": stream})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "reply_too_large" and "the limit of a reply is 2097152" in error["message"]
        assert engine.submitted == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "logprobs": 9}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **_CHAT}),
        ("/completion", {"prompt": "a", "n_predict": 2, "n_probs": 9}),
    ],
)
async def test_replies_share_a_budget(path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_HELD_UNITS", 2)
    engine = ScriptedEngine(says("a"))
    engine.gate.clear()
    async with client(make_app(engine)) as http:
        first = asyncio.create_task(http.post(path, json=body))
        await until(lambda: engine.running == 1)
        busy = await http.post(path, json=body)
        assert busy.status_code == 429 and busy.headers["retry-after"] == "5"
        engine.gate.set()
        assert (await first).status_code == 200
        assert (await http.post(path, json=body)).status_code == 200


@pytest.mark.parametrize("large", [40, 39, 30, 21])
@pytest.mark.parametrize("owners", ["abc", "abcdef", "aabbcc"])
def test_large_requests_of_owners_leave_others_some_of_the_budget(
    owners: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that a new owner gets some of the budget, whatever the sizes of the others' requests."""
    monkeypatch.setattr(sharing, "MAX_HELD_UNITS", 40)
    shared = sharing.ReplyBudget()
    with ExitStack() as reserved:
        for owner in owners:
            current_owner.set(owner)
            for entries in (large, 1):
                with suppress(QueueFullError):
                    reserved.enter_context(shared.reserve_numbers(5 * entries, "input", ""))
        current_owner.set("newcomer")
        reserved.enter_context(shared.reserve_numbers(5, "input", ""))
        assert 20 < shared.shares.held.total() <= 2 * 40


@pytest.mark.parametrize("owners", ["aab", "aabc", "aaaaaabcd"])
def test_an_owner_leaves_others_a_share_of_the_budget(owners: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the owners' shares; a reservation's release is counted for its owner, whoever is current."""
    monkeypatch.setattr(sharing, "MAX_HELD_UNITS", 40)
    shared = sharing.ReplyBudget()
    with ExitStack() as reserved:
        for owner in owners:
            current_owner.set(owner)
            with suppress(QueueFullError):
                reserved.enter_context(shared.reserve_numbers(5 * 20 if owner == "a" else 5, "input", ""))
        assert shared.shares.held == Counter("a" * 40 + owners.lstrip("a"))
    assert not shared.shares.held
    current_owner.set("a")
    with shared.reserve_numbers(5 * 40, "input", ""):
        assert shared.shares.held["a"] == 40


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 60, "logprobs": 3}),  # 64 bytes per token, 200 bytes per unit
        ("/v1/responses", {"input": "a", "max_output_tokens": 6, "top_logprobs": 3, "include": [_LOGPROBS]}),
        ("/embedding", {"input": [[1] * 25], "pooling": "none"}),
    ],
)
async def test_the_budget_is_taken_until_the_client_has_the_reply(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MAX_HELD_UNITS", 20)
    begun, gate = asyncio.Event(), asyncio.Event()
    async with real_engine() as (engine, _):
        app = make_app(engine)

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_slowly(message: Message) -> None:
                begun.set()
                await gate.wait()
                await send(message)

            await app(scope, receive, send_slowly)

        async with client(slow) as slow_http, client(app) as http:
            first = asyncio.create_task(slow_http.post(path, json=body))
            await begun.wait()
            assert (await http.post(path, json=body)).status_code == 429
            gate.set()
            assert (await first).status_code == 200
            assert (await http.post(path, json=body)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_shown_is_rendered_off_the_event_loop(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, verbose = set[int](), OpenAiView._verbose

    def spied(*given: Any) -> Any:
        threads.add(threading.get_ident())
        return verbose(*given)

    monkeypatch.setattr(OpenAiView, "_verbose", spied)
    monkeypatch.setattr(json_text, "_LARGE_ENTRIES", 100)
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        body = {"prompt": [5] * 150, "max_tokens": 1, "verbose": True, "stream": stream}
        reply = await http.post("/v1/completions", json=body)
    assert "__verbose" in reply.text and threads and threading.get_ident() not in threads


@pytest.mark.parametrize("stream", [False, True])
async def test_large_replies_are_rendered_off_the_event_loop(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    row = completion_logprobs

    def spied(*given: Any) -> Any:
        threads.add(threading.get_ident())
        return row(*given)

    monkeypatch.setattr(view_module, "completion_logprobs", spied)
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        body = {"prompt": [5] * 150, "max_tokens": 0, "echo": True, "logprobs": 128, "stream": stream}
        reply = await http.post("/v1/completions", json=body)
        assert threads and threading.get_ident() not in threads
        shown = events_of(reply.text)[1]["choices"] if stream else reply.json()["choices"]
        assert len(shown[0]["logprobs"]["top_logprobs"]) == 149 + (not stream)
        threads.clear()
        await http.post("/v1/completions", json={**body, "logprobs": 1, "prompt": "a b", "max_tokens": 1})
        assert threads == {threading.get_ident()}


def _ranking_service(*given: Any, **named: Any) -> TextService:
    service = make_service(*given, **named)
    service.settings = replace(service.settings, ranking=Ranking(PairForm((5,), (7,), ()), of_last=False))
    return service


async def _ranks(self: TextService, query: str, documents: Sequence[str], salt: str) -> list[Rank]:
    return [Rank(0.5, 3) for _ in documents]


_LONG = "word " * 40_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": "a", "documents": [_LONG], "return_documents": True}),
        ("/rerank", {"query": "a", "texts": [_LONG], "return_text": True}),
        ("/v2/rerank", {"query": "a", "documents": [_LONG], "return_documents": True}),
        ("/detokenize", {"tokens": [65] * 100_000}),
        ("/apply-template", {"messages": [{"role": "user", "content": _LONG}]}),
    ],
)
async def test_long_texts_are_rendered_off_the_event_loop(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, render = set[int](), json_text.to_json

    def spied(value: Any) -> bytes:
        threads.add(threading.get_ident())
        return render(value)

    monkeypatch.setattr(json_text, "to_json", spied)
    monkeypatch.setattr(served_apps, "make_service", _ranking_service)
    monkeypatch.setattr(TextService, "rank", _ranks)
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 200 and len(reply.content) >= 100_000
    assert threads and threading.get_ident() not in threads


def test_a_coordinator_shares_its_interpreter_finely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the switch interval, since rendering threads delay the event loop by one interval after each wait."""
    before, seen = sys.getswitchinterval(), []

    def run(work: Any) -> None:
        work.close()
        seen.append(sys.getswitchinterval())

    monkeypatch.setattr(asyncio, "run", run)
    config = load_config(None, ["model=tiny.gguf", f"state_dir={tmp_path}", "listen=127.0.0.1:0"])
    try:
        serve(config, [tmp_path / "tiny.gguf"], lambda _: None)
        assert seen and seen[0] < 0.001 < before
    finally:
        sys.setswitchinterval(before)


def test_parts_are_the_json_of_the_whole() -> None:
    def value(array: Any) -> dict[str, Any]:
        rows = [{"id": number, "text": "\u20ac\ud800", "top": {"a": -0.5}} for number in range(1000)]
        return {"empty": array([]), "none": None, "list": [{"rows": array(rows)}, 1], "tuple": (1, 2), "dict": {}}

    parts = [*json_parts(value(iter))]
    assert b"".join(parts) == to_json(value(list)) == to_json(value(iter))
    assert len(parts) == 1
    large = [*json_parts({"rows": ("x" * 100 for _ in range(10_000))})]
    assert max(map(len, large)) < 1 << 17 and len(large) > 10
    assert json.loads(b"".join(large)) == {"rows": ["x" * 100] * 10_000}


@pytest.mark.parametrize("path", PATHS)
async def test_a_kept_reply_of_many_parts_has_a_length(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "_LARGE_ENTRIES", 16)
    monkeypatch.setattr(json_text, "_PART_BYTES", 64)
    async with served(tmp_path / "journal") as server:
        body = body_of(path, stream=False)
        direct = await server.http.post(path, json=body)
        assert direct.status_code == 200 and "content-length" not in direct.headers
        for _ in range(2):
            kept = await server.http.post(path, json=body, headers=KEY)
            assert kept.status_code == 200 and kept.json()
            assert kept.headers["content-length"] == str(len(kept.content))
            assert "transfer-encoding" not in kept.headers


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        to_json({"a": {1}})


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_body_that_is_cancelled_ends_after_the_part_that_is_rendered(
    place: int, cancels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "_PART_BYTES", 1)
    monkeypatch.setattr(json_text, "_GROUP", 1)
    loop, rendering, gate, closed = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), list[int]()

    def items() -> Generator[str, None, None]:
        try:
            for number in range(5):
                if number == place:
                    loop.call_soon_threadsafe(rendering.set)
                    assert gate.wait(60)
                yield "x"
        finally:
            closed.append(number)

    async def take(body: JsonBody) -> None:
        async with aclosing(body):
            async for _ in body:
                pass

    async with asyncio.timeout(60):
        taking = asyncio.create_task(take(json_body(items, is_large=True)))
        await rendering.wait()
        taking.cancel()
        await asyncio.sleep(0)
        assert not taking.done()
        if cancels == 2:
            taking.cancel()
            await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
        await until(lambda: closed == [place])


@pytest.mark.parametrize("top", [0, 1, 5, 20, 128])
def test_the_largest_reply_fits_beside_those_of_others(top: int) -> None:
    """Checks that packed rows of three owners' largest replies fit together."""
    shared, rows = sharing.ReplyBudget(), sharing.MAX_REPLY_ENTRIES // (1 + top)
    largest = sharing.ReplySize(rows, top, True, sharing.RowStorage.PACKED)
    with ExitStack() as reserved:
        for owner in "abc":
            current_owner.set(owner)
            reserved.enter_context(shared.reserve([largest]))
        assert shared.shares.held.total() * sharing.UNIT_BYTES < 300 << 20


@pytest.mark.parametrize("storage", [sharing.RowStorage.CHUNKS, sharing.RowStorage.STREAMED])
@pytest.mark.parametrize(("top", "prompts", "most_rows"), [(0, 1, 699_050), (1, 2, 344_926), (2, 64, 10_638)])
def test_a_reply_that_takes_more_than_the_budget_is_refused_at_once(
    storage: sharing.RowStorage, top: int, prompts: int, most_rows: int
) -> None:
    """Tests also replies with few entries, since a token that is not packed takes 600 bytes."""
    shared = sharing.ReplyBudget()
    largest = sharing.ReplySize(most_rows, top, True, storage)
    with shared.reserve([largest] * prompts):
        assert shared.shares.held.total() * sharing.UNIT_BYTES >= prompts * largest.held_bytes
    with pytest.raises(ParameterError, match=r"take 40[1-9] MiB, but the limit of a reply is 400 MiB") as error:
        shared.reserve([replace(largest, rows=round(most_rows * 1.01))] * prompts)
    assert error.value.code == "reply_too_large" and not shared.shares.held
    assert shared.reserve([replace(largest, rows=most_rows, has_logprobs=False)] * prompts)


async def test_a_response_whose_logprobs_take_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_HELD_UNITS", 18)
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        body = {"input": "a", "max_output_tokens": 6, "top_logprobs": 3, "include": [_LOGPROBS]}  # 19 units
        refused = await http.post("/v1/responses", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "reply_too_large"
        assert (await http.post("/v1/responses", json={**body, "max_output_tokens": 5})).status_code == 200
