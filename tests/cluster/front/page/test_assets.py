"""Checks that the server sends the page's files complete, small, with a strict policy and without a key."""

from __future__ import annotations

import re
from posixpath import dirname, join, normpath
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.http.page import assets
from support.clusters.served import ScriptedEngine, client, make_app, says

MOST_BYTES = 300 << 10
IMPORT = re.compile(r"""^(?:import|export)\b[^"';]*?from\s+"([^"]+)";""", re.MULTILINE)
SINKS = re.compile(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function|srcdoc|setHTML)\b")


def http(**settings: Any) -> httpx.AsyncClient:
    return client(make_app(ScriptedEngine(says("a")), **settings), headers={"Accept": "text/html,*/*;q=0.8"})


def texts(suffix: str) -> dict[str, str]:
    return {path: asset.data.decode() for path, asset in assets().items() if path.endswith(suffix)}


async def test_every_file_is_sent_under_the_policy() -> None:
    async with http() as api:
        for path, asset in assets().items():
            reply = await api.get(path)
            assert (reply.status_code, reply.content) == (200, asset.data)
            assert reply.headers["content-type"] == asset.media_type
            assert reply.headers["x-content-type-options"] == "nosniff"
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy


async def test_an_unchanged_file_is_not_sent_again() -> None:
    async with http() as api:
        first = await api.get("/")
        again = await api.get("/", headers={"If-None-Match": first.headers["etag"]})
        other = await api.get("/", headers={"If-None-Match": '"another"'})
    assert (again.status_code, again.content) == (304, b"") and other.status_code == 200
    assert first.headers["cache-control"] == "no-cache"


async def test_the_page_needs_no_key_and_the_api_behind_it_does() -> None:
    async with http(api_keys=("first-key",)) as api:
        assert {(await api.get(path)).status_code for path in assets()} == {200}
        for path in ("/cluster", "/v1/models", "/browser/none.js", "/cluster/workers/a/log"):
            assert (await api.get(path)).status_code == 401


async def test_only_browsers_get_the_page() -> None:
    async with http() as api:
        assert (await api.get("/")).headers["vary"] == "Accept"
        other = await api.get("/", headers={"Accept": "*/*"})
        assert other.text == "Ollama is running"
        assert (await api.get("/browser/main.js", headers={"Accept": "*/*"})).status_code == 200


@pytest.mark.parametrize("path", ["/browser/", "/browser/../app.py", "/browser/%2e%2e/assets.py", "/browser/chat"])
async def test_no_other_path_is_a_file(path: str) -> None:
    async with http() as api:
        assert (await api.get(path)).status_code in (404, 307)


async def test_other_hosts_and_pages_are_refused() -> None:
    """Tests DNS rebinding and requests from pages of other sites."""
    async with http() as api:
        assert (await api.get("/", headers={"Host": "evil.example"})).status_code == 403
        drain = await api.post("/cluster/workers/a/drain", headers={"Origin": "https://evil.example"})
        assert drain.status_code == 403


async def test_files_are_read_alone() -> None:
    async with http() as api:
        for path in assets():
            assert (await api.post(path)).status_code in (404, 405)
            assert (await api.head(path)).headers["etag"] == assets()[path].etag


async def test_the_page_is_behind_the_prefix() -> None:
    async with http(prefix="/llm") as api:
        assert (await api.get("/llm/")).content == (await api.get("/")).content
        assert (await api.get("/llm/browser/main.js")).status_code == 200


async def test_the_files_are_no_operations_of_the_api() -> None:
    async with http() as api:
        paths = (await api.get("/openapi.json")).json()["paths"]
    assert not [path for path in paths if path.startswith("/browser")]


def test_the_files_are_small_and_reach_no_other_host() -> None:
    assert sum(len(asset.data) for asset in assets().values()) <= MOST_BYTES
    for path, asset in assets().items():
        found = re.findall(r"https?://[^\s\"'`)]+", asset.data.decode())
        assert {*found} <= {"http://www.w3.org/2000/svg"}, path


def test_every_import_is_a_file() -> None:
    for path, text in texts(".js").items():
        for name in IMPORT.findall(text):
            assert normpath(join(dirname(path), name)) in assets(), f"{path}: {name}"
    page = assets()["/"].data.decode()
    assert {f"/{name}" for name in re.findall(r'(?:src|href)="(browser/[^"]+)"', page)} <= assets().keys()


def test_nothing_on_the_page_is_inline_or_made_of_markup() -> None:
    page = assets()["/"].data.decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page) == []
    for path, text in texts(".js").items():
        assert SINKS.findall(text) == [], path
