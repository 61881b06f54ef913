"""Tests of `POST /slots/ID?action=save|restore|erase`, which saves tokens in files and restores the prefix cache."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.dialects.llamacpp import slots
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.state import disk_thread
from llamaclust.core import regular_file
from llamaclust.core.sampler.results import RowResult
from support.clusters.served import SETTINGS, client, make_app, make_service, real_engine, tokenizer

PROMPT = "the quick brown fox jumps over the lazy dog " * 2
REQUEST = {"prompt": PROMPT, "n_predict": 20, "seed": 1, "id_slot": 1, "return_tokens": True}
SAVE, RESTORE, ERASE = (f"/slots/1?action={action}" for action in ("save", "restore", "erase"))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@asynccontextmanager
async def serving(folder: Path, model_id: str = SETTINGS.model_id) -> AsyncIterator[httpx.AsyncClient]:
    """Yields a client of a server whose KV cache is empty."""
    async with (
        real_engine(replace(SETTINGS, model_id=model_id)) as (engine, _),
        client(make_app(engine, slot_folder=folder)) as http,
    ):
        yield http


async def complete(http: httpx.AsyncClient, **fields: Any) -> Any:
    reply = await http.post("/completion", json=REQUEST | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def saved(http: httpx.AsyncClient, name: str = "a.bin") -> Any:
    await complete(http)
    reply = await http.post(SAVE, json={"filename": name})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def error(http: httpx.AsyncClient, path: str, body: Any, status: int = 400) -> str:
    reply = await http.post(path, json=body)
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"]["message"])


async def test_a_slot_is_saved_and_restored_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        first = await complete(http)
        reply = await saved(http)
        tokens = first["tokens_evaluated"] + first["tokens_predicted"] - 1  # the last token is not computed
        assert (reply["id_slot"], reply["filename"], reply["n_saved"]) == (1, "a.bin", tokens)
        assert reply["n_written"] == (tmp_path / "a.bin").stat().st_size and reply["timings"]["save_ms"] >= 0
        assert first["id_slot"] == 1 and first["timings"]["cache_n"] == 0
    async with serving(tmp_path) as http:
        restored = (await http.post("/slots/0?action=restore", json={"filename": "a.bin"})).json()
        assert (restored["id_slot"], restored["n_restored"]) == (0, tokens)
        assert restored["n_read"] == reply["n_written"] and restored["timings"]["restore_ms"] >= 0
        longer = {"prompt": [*tokenizer().encode(PROMPT), *first["tokens"]], "n_predict": 1, "id_slot": -1}
        assert (await complete(http, **longer))["timings"]["cache_n"] == tokens // 16 * 16
        again = await complete(http, id_slot=2)
        assert again["timings"]["cache_n"] == first["tokens_evaluated"] // 16 * 16 >= 32
        assert again["tokens"] == first["tokens"] and again["content"] == first["content"]
        copied = (await http.post("/slots/0?action=save", json={"filename": "b.bin"})).json()
        assert copied["n_saved"] == tokens
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert _names(tmp_path) == ["a.bin", "b.bin"]


async def test_a_disk_that_hangs_ends_the_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back, write = threading.Event(), regular_file.write_bytes

    def hanging(path: Path, data: bytes) -> None:
        back.wait(20)
        write(path, data)

    async with serving(tmp_path) as http:
        await complete(http)
        monkeypatch.setattr(regular_file, "write_bytes", hanging)
        monkeypatch.setattr(disk_thread, "_CALL_S", 0.05)
        try:
            late = await error(http, SAVE, {"filename": "a"}, 500)
            assert late == "filename: 'a': the slot cannot be saved: no answer within 0.05 s"
            assert "an earlier call has not returned" in await error(http, SAVE, {"filename": "b"}, 500)
        finally:
            back.set()
        monkeypatch.undo()
        async with asyncio.timeout(60):
            while (await http.post(SAVE, json={"filename": "b"})).status_code != 200:  # noqa: ASYNC110  like a client
                await asyncio.sleep(0.005)
    assert _names(tmp_path) == ["a", "b"]


async def test_requests_for_slot_files_wait_for_each_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        await complete(http)
        replies = await asyncio.gather(*(http.post(SAVE, json={"filename": f"a{number}"}) for number in range(5)))
    assert [reply.status_code for reply in replies] == [200] * 5 and len(_names(tmp_path)) == 5


async def test_an_erased_slot_has_no_tokens_and_others_share_its_memory(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        first, warm = await complete(http), await complete(http)
        assert warm["timings"]["cache_n"] > 0
        erased = (await http.post(ERASE)).json()
        assert erased == {"id_slot": 1, "n_erased": warm["tokens_evaluated"] + warm["tokens_predicted"] - 1}
        other = await complete(http, id_slot=2)
        assert other["timings"]["cache_n"] == warm["timings"]["cache_n"] and other["tokens"] == first["tokens"]
        assert (await http.post(ERASE)).json()["n_erased"] == 0
        assert "no tokens" in await error(http, SAVE, {"filename": "a"})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "n": 2}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "stream": True}),
    ],
)
async def test_every_endpoint_of_llama_cpp_takes_a_slot(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async with serving(tmp_path) as http:
        assert (await http.post(path, json=body | {"slot_id": 3})).status_code == 200
        reply = await http.post("/slots/3?action=save", json={"filename": "a"})
        assert reply.json()["n_saved"] > 32 and (await http.post(SAVE, json={"filename": "a"})).status_code == 400


@pytest.mark.parametrize("name", ["../a", "a/b", "/tmp/a", ".a", "..", "", "a\0", "a b", "ä", "a" * 129])
async def test_a_name_is_plain(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    (tmp_path / "a").write_bytes(b"of others")
    async with serving(folder) as http:
        await complete(http)
        for path in (SAVE, RESTORE):
            assert (await error(http, path, {"filename": name})).startswith("filename: ")
    assert not _names(folder) and (tmp_path / "a").read_bytes() == b"of others"


async def test_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    async with serving(folder) as http:
        await saved(http)
        outside = tmp_path / "outside"
        outside.write_bytes((folder / "a.bin").read_bytes())
        (folder / "link").symlink_to(outside)
        assert "cannot be restored" in await error(http, RESTORE, {"filename": "link"})
        os.mkfifo(folder / "pipe")
        assert "cannot be restored" in await error(http, RESTORE, {"filename": "pipe"})
        (folder / "folder").mkdir()
        assert "cannot be restored" in await error(http, RESTORE, {"filename": "folder"})
        before = outside.read_bytes()
        for name in ("link", "pipe"):
            assert f"{name!r} cannot be replaced" in await error(http, SAVE, {"filename": name})
    assert outside.read_bytes() == before and (folder / "link").is_symlink() and (folder / "pipe").is_fifo()


async def test_only_slot_files_are_replaced(tmp_path: Path) -> None:
    others = {"a": b"", "model.gguf": b"GGUF" + bytes(99), "b.json": b'{"format": "another"}\n'}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    async with serving(tmp_path) as http:
        first = await saved(http)
        path = tmp_path / "a.bin"
        path.write_bytes(path.read_bytes()[:-1])
        assert (await saved(http))["n_written"] == first["n_written"] == path.stat().st_size
        for name in (*others, "folder"):
            assert f"{name!r} cannot be replaced" in await error(http, SAVE, {"filename": name})
    assert {name: (tmp_path / name).read_bytes() for name in others} == others
    assert _names(tmp_path) == sorted((*others, "folder", "a.bin"))


def _signed(content: bytes) -> bytes:
    return content + sha256(content).digest()


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"cache_salt": "", "adapters": []},
        {"cache_salt": "", "adapters": [], "tokens": 2},
        {"cache_salt": "", "adapters": 7, "tokens": 1},
        {"cache_salt": "", "adapters": [7], "tokens": 1},
    ],
    ids=["no fields", "no count", "another count", "adapters that are none", "an adapter that is none"],
)
async def test_fields_of_a_slot_file_are_checked(tmp_path: Path, head: dict[str, Any]) -> None:
    fields = {"format": "llamaclust slot 1", "model": SETTINGS.model_id} | head
    (tmp_path / "a").write_bytes(_signed(json.dumps(fields).encode() + b"\n" + bytes(4)))
    async with serving(tmp_path) as http:
        assert "cannot be restored" in await error(http, RESTORE, {"filename": "a"})


def _flip(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize(
    "damage",
    [_flip, lambda data: data[:-1], lambda data: b"", lambda data: b"ggsq" + data],
    ids=["a bit", "an end", "all", "a beginning"],
)
async def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any) -> None:
    async with serving(tmp_path) as http:
        before = await saved(http)
        path = tmp_path / "a.bin"
        path.write_bytes(damage(path.read_bytes()))
        assert "damaged" in await error(http, RESTORE, {"filename": "a.bin"})
        assert "there is no file 'b'" in await error(http, RESTORE, {"filename": "b"})
        after = (await http.post(SAVE, json={"filename": "c"})).json()
        assert after["n_saved"] == before["n_saved"]


async def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        await saved(http)
    async with serving(tmp_path, "other") as http:
        assert "another model" in await error(http, RESTORE, {"filename": "a.bin"})


async def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_MOST_FILES", 1)
    async with serving(tmp_path) as http:
        await saved(http)
        assert "the limit is 1" in await error(http, SAVE, {"filename": "b"})
        await saved(http)  # replaces the file
        monkeypatch.setattr(slots, "_MOST_BYTES", 100)
        assert "larger than" in await error(http, RESTORE, {"filename": "a.bin"})


async def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    async with serving(folder) as http:
        await complete(http)
        folder.rmdir()
        assert "cannot be saved: No such file" in await error(http, SAVE, {"filename": "a"}, 500)


async def test_wrong_slots_and_actions_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        for slot in ("8", "-1", "one", "1" * 400, "²"):
            assert "8 slots" in await error(http, f"/slots/{slot}?action=save", {"filename": "a"})
        assert "action" in await error(http, "/slots/1?action=delete", {"filename": "a"})
        assert "action" in await error(http, "/slots/1", {"filename": "a"})
        assert "filename" in await error(http, SAVE, {})
        assert "8 slots" in await error(http, "/completion", REQUEST | {"id_slot": 8})


async def test_without_a_folder_slots_remember_nothing() -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        for slot, ignored in ((1000, "id_slot"), (-1, None)):
            reply = await http.post("/completion", json=REQUEST | {"id_slot": slot})
            assert reply.status_code == 200 and reply.headers.get(HEADER) == ignored
        for action in ("save", "restore", "erase"):
            assert "api.slot_folder" in await error(http, f"/slots/0?action={action}", {"filename": "a"}, 501)


@pytest.mark.parametrize("token", [-1, 1 << 32, 1 << 40, 999_999])
async def test_a_slot_does_not_remember_tokens_that_are_refused(tmp_path: Path, token: int) -> None:
    async with serving(tmp_path) as http:
        kept = (await saved(http))["n_saved"]
        for prompt in ([token], ["a", token]):
            await error(http, "/completion", {"prompt": prompt, "id_slot": 1})
        assert (await http.post(SAVE, json={"filename": "a.bin"})).json()["n_saved"] == kept


async def test_a_slot_has_the_tokens_that_an_earlier_coordinator_recorded() -> None:
    tokens, rows = list[list[int]](), list[RowResult]()
    for recorded in (0, 5):
        async with real_engine() as (engine, _):
            service = make_service(engine, slots=1)
            answered = {0: tuple(rows[:recorded])} if recorded else {}
            request = CompletionRequest((1, 2, 3), 8, seed=7, ignore_eos=True, slot=0, answered=answered)
            async with await service.start(request) as running:
                rows = [row async for chunk in running.log.chunks() for row in chunk.rows]
            tokens.append([*service.slots.tokens(0).tokens])
    assert tokens[0] == tokens[1] == [1, 2, 3, *(row.token for row in rows[:-1])]
