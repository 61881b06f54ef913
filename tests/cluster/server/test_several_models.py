"""Tests of the API of several models: requests to each, lists, and Ollama's `keep_alive`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.model_lifecycle import ModelLifecycle
from llamaclust.cluster.front.app import create_app
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.server.front import api_models, api_settings
from llamaclust.cluster.server.status import cluster_status
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.cluster.state.journal import Journal
from support.clusters.served import serving
from support.several_models.cluster import ASLEEP, AWAKE, Models, model_files, models

PROMPT = {"prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
RECORD = ClusterRecord(name="tiny", pid=1, api="http://x", model="a", api_keys_file=None, launcher="local")


@dataclass
class Api:
    found: Models
    http: httpx.AsyncClient

    async def post(self, path: str, **body: Any) -> Any:
        reply = await self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def get(self, path: str) -> Any:
        reply = await self.http.get(path)
        assert reply.status_code == 200, reply.text
        return reply.json()


@asynccontextmanager
async def api_of(files: list[Path], folder: Path, *, tight: bool) -> AsyncIterator[Api]:
    async with (
        models(files, folder, tight=tight) as found,
        aclosing(Journal(folder / "journal", found.cluster.record, 30.0)) as journal,
        api_models(found.cluster, ApiSettings(), journal, partial(cluster_status, found.cluster, RECORD)) as served,
    ):
        app = create_app(served)
        await served[0].replies.restore([])
        async with serving(app) as address, httpx.AsyncClient(base_url=address, trust_env=False, timeout=60) as http:
            yield Api(found, http)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return model_files(tmp_path_factory.mktemp("models"))


async def test_requests_reach_the_model_that_they_name(files: list[Path], tmp_path: Path) -> None:
    async with api_of(files, tmp_path, tight=True) as api:
        own = {name: (await api.post("/v1/completions", model=name, **PROMPT))["choices"][0]["text"] for name in "ab"}
        assert own["a"] != own["b"] and api.found.states == [ASLEEP, AWAKE]
        unnamed = await api.post("/v1/completions", **PROMPT)
        assert (unnamed["model"], unnamed["choices"][0]["text"]) == ("a", own["a"])
        llamacpp = await api.post("/completion", model="b", prompt="abc", n_predict=8, temperature=0, ignore_eos=True)
        assert llamacpp["content"] == own["b"]
        assert (await api.http.post("/api/copy", json={"source": "b", "destination": "poet"})).status_code == 200
        copied = await api.post("/v1/completions", model="poet:latest", **PROMPT)
        assert (copied["model"], copied["choices"][0]["text"]) == ("b", own["b"])
        both = await asyncio.gather(*(api.post("/v1/completions", model=name, **PROMPT) for name in "abab"))
        assert [reply["choices"][0]["text"] for reply in both] == [own[name] for name in "abab"]
        for path in ("/v1/completions", "/completion", "/api/generate", "/v1/messages"):
            refused = await api.http.post(path, json={"model": "c", **PROMPT})
            assert refused.status_code == 404 and "'c' is not served here, only 'a', 'b'" in refused.text
        wrong = await api.http.post("/v1/completions", content=b"no json")
        assert wrong.status_code == 400 and "not valid JSON" in wrong.text


def test_requests_that_wait_for_a_model_keep_out_none_of_another() -> None:
    values = {"model": "m", "workers": [{"name": "w"}], "max_sequences": 4, "max_waiting": 8}
    of_one = api_settings(ClusterConfig.model_validate(values)).max_requests
    assert of_one > 4 + 8
    several = {**values, "models": [{"model": "m"}, {"model": "n"}, {"model": "o"}]}
    del several["model"]
    assert api_settings(ClusterConfig.model_validate(several)).max_requests == 3 * of_one
    of_many = api_settings(ClusterConfig.model_validate({**values, "max_waiting": 10_000}))
    assert of_many.max_kept_replies == of_many.max_requests > 10_000, "accepted requests are restored after a restart"


async def test_a_stream_waits_for_its_model(files: list[Path], tmp_path: Path) -> None:
    async with api_of(files, tmp_path, tight=True) as api:
        assert api.found.states == [AWAKE, ASLEEP]
        body = {"model": "b", **PROMPT, "stream": True}
        async with api.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = [line async for line in reply.aiter_lines()]
        assert lines[-2] == "data: [DONE]" or "data: [DONE]" in lines
        assert api.found.states == [ASLEEP, AWAKE]


async def test_lists_say_which_models_are_loaded(files: list[Path], tmp_path: Path) -> None:
    async with api_of(files, tmp_path, tight=False) as api:
        assert (await api.get("/cluster?model=b"))["plan"] is None, "never loaded"
        listed = await api.get("/v1/models")
        assert [(model["id"], model["status"]["value"]) for model in listed["data"]] == [
            ("a", "loaded"),
            ("b", "unloaded"),
        ]
        assert await api.get("/models") == listed
        assert (await api.get("/v1/models/b"))["id"] == "b"
        assert [model["name"] for model in (await api.get("/api/tags"))["models"]] == ["a:latest", "b:latest"]
        assert [model["name"] for model in (await api.get("/api/ps"))["models"]] == ["a:latest"]
        assert await api.post("/models/load", model="b") == {"success": True}
        await api.found.until(AWAKE, AWAKE)
        assert len((await api.get("/api/ps"))["models"]) == 2
        assert await api.post("/models/unload", model="a") == {"success": True}
        assert api.found.states == [ASLEEP, AWAKE]
        status = await api.get("/cluster")
        assert [(model["name"], model["state"]) for model in status["status"]["models"]] == [
            ("a", "asleep"),
            ("b", "ready"),
        ]
        assert [worker["layers"] for worker in status["status"]["workers"]] == [None, None], "of the first model"
        of_b = await api.get("/cluster?model=b")
        assert of_b["status"]["model"] == "b" and of_b["status"]["state"] == "ready"
        assert [worker["layers"] for worker in of_b["status"]["workers"]] == [[0, 3], [3, 6]] and of_b["plan"]
        assert (await api.get("/health"))["status"] == "ok"
        assert (await api.get("/props?model=b"))["model_alias"] == "b"
        assert (await api.http.get("/props?model=c")).status_code == 404


async def test_requests_of_all_models_are_found(files: list[Path], tmp_path: Path) -> None:
    async with api_of(files, tmp_path, tight=False) as api:
        ids = [(await api.post("/v1/completions", model=name, **PROMPT))["id"].removeprefix("cmpl-") for name in "abba"]
        listed = (await api.get("/cluster/requests"))["requests"]
        assert [(record["id"], record["model"]) for record in listed] == [
            (id[:8], name) for id, name in zip(ids, "abba", strict=True)
        ]
        of_b = (await api.get("/cluster/requests?model=b"))["requests"]
        assert [record["id"] for record in of_b] == [ids[1][:8], ids[2][:8]]
        (found,) = (await api.get(f"/cluster/requests/cmpl-{ids[2]}"))["requests"]
        assert (found["model"], found["generated_tokens"]) == ("b", 8) and found["phases"]
        metrics = (await api.http.get("/metrics")).text
        assert 'llamaclust_generated_tokens_total{model="b"} 16.0' in metrics
        assert 'llamacpp:tokens_predicted_total{model="a"} 16' in metrics
        assert 'model="a"' not in (await api.http.get("/metrics?model=b")).text
        unknown = await api.http.get("/cluster/requests/0000000000")
        assert unknown.status_code == 404 and "among the last 4" in unknown.text


async def test_clients_choose_a_model(files: list[Path], tmp_path: Path) -> None:
    async with api_of(files, tmp_path, tight=False) as api:
        address = str(api.http.base_url)
        async with AsyncClient(address, model="b") as of_b, AsyncClient(address) as unnamed:
            own = [await client.generate("abc", max_tokens=8, ignore_eos=True) for client in (of_b, unnamed)]
            assert await of_b.tokenize("abc") and await of_b.embed(["abc"])
        listed = (await api.get("/cluster/requests"))["requests"]
        assert [record["model"] for record in listed] == ["b", "a", "b"] and own[0].text != own[1].text
        assert [record["end"] for record in listed] == ["length", "length", "embedded"]


async def test_a_model_is_unloaded_when_its_request_says_so(files: list[Path], tmp_path: Path) -> None:
    async with api_of(files, tmp_path, tight=False) as api:
        asked = {"model": "b:latest", "prompt": "abc", "stream": False, "options": {"num_predict": 4}}
        reply = await api.post("/api/generate", **asked, keep_alive="5m")
        assert reply["done"]
        async with asyncio.timeout(60):  # The time is set after the reply was sent.
            while (await api.get("/api/ps"))["models"][1]["expires_at"].startswith("2318"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await api.post("/api/generate", **asked, keep_alive=0)
        await api.found.until(AWAKE, ASLEEP)
        for keep_alive, reason in ((0, "unload"), ("0s", "unload"), (-1, "load")):
            reply = await api.post("/api/generate", model="b", stream=False, keep_alive=keep_alive)
            assert reply["done_reason"] == reason
        await api.found.until(AWAKE, AWAKE)
        await api.post("/api/generate", model="b", stream=False, keep_alive=0)
        await api.found.until(AWAKE, ASLEEP)
        refused = await api.http.post("/api/generate", json={**asked, "keep_alive": "soon"})
        assert refused.status_code == 400 and json.loads(refused.text)["error"].startswith("keep_alive: 'soon' is no")


async def test_a_model_that_is_about_to_sleep_is_not_listed_as_loaded(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, sleep = asyncio.Event(), ModelLifecycle.sleep

    async def sleep_late(lifecycle: ModelLifecycle) -> None:
        await goes_on.wait()
        await sleep(lifecycle)

    monkeypatch.setattr(ModelLifecycle, "sleep", sleep_late)
    async with api_of(files, tmp_path, tight=False) as api:
        await api.post("/v1/completions", model="b", **PROMPT)
        await api.post("/api/generate", model="b", stream=False, keep_alive=0)
        assert [model["name"] for model in (await api.get("/api/ps"))["models"]] == ["a:latest"]
        assert api.found.states == [AWAKE, AWAKE]
        goes_on.set()
        await api.found.until(AWAKE, ASLEEP)
