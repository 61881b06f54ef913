"""Tests of health, metrics, state, access control and bounds on bodies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.errors import MOST_CHARACTERS
from llamaclust.cluster.front.http import responses
from llamaclust.cluster.state.api_keys import first_key, read_api_keys
from llamaclust.core.errors import InsufficientMemoryError, UsageError, WorkerError
from llamaclust.wire.control.logs import LogTail
from support.clusters.served import MODEL, SETTINGS, ScriptedEngine, client, make_app, real_engine, says


def app(**settings: Any) -> Any:
    return make_app(ScriptedEngine(says("a")), **settings)


async def test_health_reports_the_reason() -> None:
    async with real_engine() as (engine, pipeline), client(make_app(engine)) as http:
        assert (await http.get("/health")).json() == (await http.get("/live")).json() == {"status": "ok"}
        pipeline.lose(WorkerError("worker w1 (layers 2-3) was lost: killed"))
        await http.post("/v1/completions", json={"prompt": "a"})
        down = await http.get("/health")
        assert down.status_code == 503 and "layers 2-3" in down.json()["error"]["message"]
        assert down.json()["error"]["code"] == "cluster_down"
        assert (await http.get("/live")).status_code == 503
        refused = await http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and "layers 2-3" in refused.json()["error"]["message"]


async def test_a_cluster_that_waits_for_a_worker_is_live() -> None:
    """Checks that `/live` succeeds, since a restart would not help."""
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        engine.fail_requests(WorkerError("no worker came back within 0.3 s"))
        health = await http.get("/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "cluster_refusing"
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 503
        assert (await http.get("/live")).status_code == 200


async def test_reasons_are_for_those_with_a_key() -> None:
    """Checks that only clients with a key get reasons, which name workers, hosts and layers."""
    async with real_engine() as (engine, _), client(make_app(engine, api_keys=("first-key",))) as http:
        engine.shut_down(WorkerError("worker w1 (layers 2-3) was lost"))
        for path in ("/health", "/live"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                refused = await http.get(path, headers=headers)
                assert refused.status_code == 503 and refused.json()["error"]["message"] == "the cluster is down"
            told = await http.get(path, headers={"Authorization": "Bearer first-key"})
            assert told.status_code == 503 and "layers 2-3" in told.json()["error"]["message"]


async def test_health_reports_draining() -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        assert await engine.drain(5)
        assert (await http.get("/health")).json()["error"]["code"] == "cluster_draining"
        assert (await http.get("/live")).status_code == 200  # needs no restart


async def test_operators_see_what_happens() -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        assert (await http.post("/v1/completions", json={"prompt": "Hello", "ignore_eos": True})).status_code == 200
        metrics = await http.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "llamaclust_generated_tokens_total 16.0" in metrics.text
        assert (await http.get("/cluster")).json() == {"status": {"name": "test"}}
        slots = (await http.get("/slots")).json()
        assert len(slots) == SETTINGS.max_sequences and not any(slot["is_processing"] for slot in slots)
        props = (await http.get("/props")).json()
        assert props["model_alias"] == MODEL and props["total_slots"] == SETTINGS.max_sequences
        assert "im_start" in props["chat_template"] and props["eos_token"] == "<|im_end|>"


@dataclass
class Workers:
    """Two workers, of which `b` cannot be drained."""

    drained: list[str] = field(default_factory=list)

    async def drain(self, name: str) -> None:
        if name == "b":
            raise InsufficientMemoryError("12 MiB are missing")
        self._check(name)
        self.drained.append(name)

    def undrain(self, name: str) -> None:
        self._check(name)
        self.drained.remove(name)

    async def log(self, name: str) -> LogTail:
        self._check(name)
        return LogTail(("one", "two"), 12)

    def _check(self, name: str) -> None:
        if name not in ("a", "b"):
            raise UsageError(f"no worker is named {name!r}")


DRAIN, UNDRAIN = "/cluster/workers/a/drain", "/cluster/workers/a/undrain"


async def test_draining_workers_needs_an_api_key() -> None:
    workers = Workers()
    key = {"Authorization": "Bearer first-key"}
    async with client(app(workers=workers, api_keys=("first-key",))) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert (await http.post(DRAIN, headers=headers)).status_code == 401
        assert (await http.post(DRAIN, headers=key | {"host": "evil.example"})).status_code == 403
        assert (await http.post(DRAIN, headers=key | {"origin": "https://evil.example"})).status_code == 403
        assert (await http.get(DRAIN, headers=key)).status_code == 405
        assert workers.drained == []
        assert (await http.post(DRAIN, headers=key)).json() == {"worker": "a", "drained": True}
        assert workers.drained == ["a"]
        assert (await http.post(UNDRAIN, headers=key)).json() == {"worker": "a", "drained": False}
        assert workers.drained == []
    async with client(app(workers=workers)) as http:
        assert (await http.post(DRAIN, headers={"origin": "https://evil.example"})).status_code == 403
        assert workers.drained == []
        assert (await http.post(DRAIN)).status_code == 200


async def test_logs_of_workers_need_an_api_key() -> None:
    key, path = {"Authorization": "Bearer first-key"}, "/cluster/workers/a/log"
    async with client(app(workers=Workers(), api_keys=("first-key",))) as http:
        assert (await http.get(path)).status_code == 401
        assert (await http.get(path, headers=key | {"host": "evil.example"})).status_code == 403
        told = (await http.get(path, headers=key)).json()
        assert told == {"worker": "a", "before": 12, "lines": ["one", "two"]}
        assert (await http.get("/cluster/workers/x/log", headers=key)).status_code == 400


async def test_workers_that_cannot_be_drained() -> None:
    async with client(app(workers=Workers())) as http:
        refused = await http.post("/cluster/workers/b/drain")
        assert refused.status_code == 507 and refused.json()["error"]["message"] == "12 MiB are missing"
        unknown = await http.post("/cluster/workers/%0Ac/drain")
        assert unknown.status_code == 400 and unknown.json()["error"]["message"] == "no worker is named '\\nc'"
    async with client(app()) as http:
        assert (await http.post(DRAIN)).status_code == 404  # a model without workers


async def test_unknown_paths_and_methods() -> None:
    async with client(app()) as http:
        missing = await http.get("/v1/nothing")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
        wrong = await http.get("/v1/completions")
        assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"


LONG = "X" * 60_000


@pytest.mark.parametrize(
    ("method", "path", "body", "headers"),
    [
        (LONG, "/v1/completions", None, {}),
        ("GET", f"/{LONG}", None, {}),
        ("POST", f"/cluster/workers/{LONG}/drain", None, {}),
        ("POST", "/v1/completions", {"prompt": "a", "temperature": LONG}, {}),
        ("POST", "/v1/chat/completions", {"model": LONG, "messages": [{"role": LONG, "content": "a"}]}, {}),
        ("POST", "/v1/completions", {"prompt": "a", "n": LONG}, {}),
        ("POST", "/v1/messages", {"model": "m", "max_tokens": LONG, "messages": []}, {"anthropic-version": LONG}),
        ("POST", "/api/show", {"model": LONG}, {}),
    ],
)
async def test_an_error_quotes_little_of_a_request(
    method: str, path: str, body: object, headers: dict[str, str]
) -> None:
    async with client(app(workers=Workers())) as http:
        reply = await http.request(method, path, json=body, headers=headers)
    assert reply.status_code >= 400 and len(reply.content) < 2 * MOST_CHARACTERS + 500, reply.text[:200]


async def test_api_keys() -> None:
    async with client(app(api_keys=("first-key", "second-key"))) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}):
            for path in ("/v1/models", "/metrics", "/cluster", "/props", "/slots", "/nothing", "/openapi.json"):
                refused = await http.get(path, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()["error"]["code"] == "invalid_api_key"
        assert (await http.get("/health")).status_code == 200
        for key in ("first-key", "second-key"):
            assert (await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
        body = {"prompt": "a"}
        assert (await http.post("/v1/completions", json=body)).status_code == 401


async def get(http: httpx.AsyncClient, **headers: str) -> int:
    return (await http.get("/v1/models", headers=headers)).status_code


async def test_foreign_hosts_are_refused() -> None:
    async with client(app()) as http:
        for host in ("127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:80", "127.0.0.1"):
            assert await get(http, host=host) == 200, host
        for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1", "192.168.0.2:8080"):
            assert await get(http, host=host) == 403, host
        for host in ("", "a b", "user@127.0.0.1", "127.0.0.1:8080:1", "127.0.0.1/x", "[", "[]"):
            assert await get(http, host=host) in (400, 403), host
        refused = await http.get("/health", headers={"host": "evil.example"})
        assert "'evil.example'" in refused.json()["error"]["message"]
    async with client(app(allowed_hosts=("llm.example",), listen_host="10.0.0.5")) as http:
        for host in ("llm.example", "LLM.example:443", "10.0.0.5:8080", "192.168.0.2", "[fe80::1]:8080"):
            assert await get(http, host=host) == 200, host
        assert await get(http, host="evil.example") == 403
    async with client(app(allowed_hosts=("*",))) as http:
        assert await get(http, host="any.example") == 200


async def test_foreign_pages_are_refused() -> None:
    async with client(app()) as http:
        assert await get(http, origin="http://127.0.0.1:8080") == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1:3000", "http://localhost:8080", "", "x://[a"):
            assert await get(http, origin=origin) == 403, origin
        reply = await http.get("/v1/models")
        assert not [name for name in reply.headers if name.startswith("access-control")]
        refused = await http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert "`allowed_origins` in the cluster file" in refused.json()["error"]["message"]
    async with client(app(allowed_origins=("https://chat.example",), api_keys=("first-key",))) as http:
        page = {"origin": "https://chat.example"}
        asked = page | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await http.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        reply = await http.get("/v1/models", headers=page | {"authorization": "Bearer first-key"})
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://chat.example"
        assert await get(http, origin="https://evil.example") == 403
        refused = await http.options("/v1/chat/completions", headers=asked | {"origin": "https://evil.example"})
        assert refused.status_code == 200 and "access-control-allow-origin" not in refused.headers


async def test_pages_of_other_sites_without_an_origin_are_refused() -> None:
    """Checks that cross-site requests pass only for links; 400 for an empty body shows that a POST passed."""
    crossing = {"sec-fetch-site": "cross-site"}
    async with client(app()) as http:
        for method in ("POST", "DELETE", "PUT"):
            refused = await http.request(method, "/v1/completions", headers=crossing)
            assert refused.status_code == 403 and refused.json()["error"]["code"] == "origin_not_allowed", method
        assert await get(http, **crossing) == (await http.head("/v1/models", headers=crossing)).status_code == 200
        own = {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:8080"}
        for headers in ({}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}, own):
            assert (await http.post("/v1/completions", headers=headers)).status_code == 400, headers
    async with client(app(allowed_origins=("*",))) as http:
        assert (await http.post("/v1/completions", headers=crossing)).status_code == 400


async def test_allowed_pages_may_read_errors_and_headers_but_send_no_cookies() -> None:
    page = {"origin": "https://chat.example"}
    key = {"authorization": "Bearer first-key"}
    for allowed in ("https://chat.example", "*"):
        async with client(app(allowed_origins=(allowed,), api_keys=("first-key",))) as http:
            for reply in (
                await http.get("/v1/models", headers=page),
                await http.get("/v1/nothing", headers=page | key),
                await http.post("/v1/completions", headers=page | key, json={"prompt": 5}),
                await http.post("/v1/completions", headers=page | key, json={"prompt": "a", "unknown": 1}),
            ):
                assert reply.headers["access-control-allow-origin"] == page["origin"]
                assert "X-Llamaclust-Ignored" in reply.headers["access-control-expose-headers"]
                assert "access-control-allow-credentials" not in reply.headers
            assert "x-llamaclust-ignored" in reply.headers
            asked = page | {"access-control-request-method": "DELETE", "access-control-request-headers": "x-api-key"}
            preflight = await http.options("/v1/streams/a", headers=asked)
            assert preflight.status_code == 200 and "access-control-allow-credentials" not in preflight.headers
            assert "DELETE" in preflight.headers["access-control-allow-methods"]
            assert "x-api-key" in preflight.headers["access-control-allow-headers"]


async def test_a_plain_page_of_the_same_address_may_not_use_https() -> None:
    """Refuses plain pages, which may be forged on the way. Behind a TLS proxy, pages use HTTPS and requests HTTP."""
    async with client(app()) as http:
        http.base_url = httpx.URL("https://127.0.0.1:8080")
        assert await get(http, origin="https://127.0.0.1:8080") == 200
        assert await get(http, origin="http://127.0.0.1:8080") == 403
        http.base_url = httpx.URL("http://127.0.0.1:8080")
        assert await get(http, origin="https://127.0.0.1:8080") == 200


async def test_pages_of_this_machine_or_any() -> None:
    async with client(app(allowed_origins=("localhost",))) as http:
        for origin in ("http://localhost", "http://localhost:3000", "https://127.0.0.1", "http://[::1]:3000"):
            reply = await http.get("/v1/models", headers={"origin": origin})
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
        for origin in ("http://localhost.evil.example", "http://evil.example", "http://notlocalhost", "null"):
            assert await get(http, origin=origin) == 403, origin
    async with client(app(allowed_origins=("*",))) as http:
        reply = await http.get("/v1/models", headers={"origin": "https://any.example"})
        assert reply.headers["access-control-allow-origin"] == "https://any.example"


async def test_large_bodies_are_refused() -> None:
    async with client(app(max_body_bytes=1000)) as http:
        body = b'{"content": "' + b"x" * 2000 + b'"}'
        assert (await http.post("/tokenize", content=body[:500] + b'"}')).status_code == 200
        told = await http.post("/tokenize", content=body)
        assert told.status_code == 413 and "1000 bytes" in told.json()["error"]["message"]

        async def parts() -> Any:
            for at in range(0, len(body), 100):
                yield body[at : at + 100]

        assert (await http.post("/tokenize", content=parts())).status_code == 413


async def test_a_body_that_never_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_DISCARD_S", 0.05)
    async with client(app(body_s=0.05)) as http:

        async def slow() -> Any:
            import asyncio

            yield b"{"
            await asyncio.sleep(5)
            yield b"}"

        assert (await http.post("/tokenize", content=slow())).status_code == 408


def test_api_keys_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# people\nfirst-key\n\n  second-key \n")
    path.chmod(0o600)
    assert read_api_keys(path) == ("first-key", "second-key")
    assert read_api_keys(None) == ()
    path.chmod(0o640)
    with pytest.raises(UsageError, match="mode 0640"):
        read_api_keys(path)
    path.chmod(0o600)
    path.write_text("\n # a comment\ngood-key-1\ngood-key-2\n")
    assert first_key(path) == "good-key-1"
    path.write_text("# emptied meanwhile\n")
    with pytest.raises(UsageError, match="no API key"):
        first_key(path)
    for text, message in (("\n#\n", "no API key"), ("short\n", "key 1"), ("good-key-1\nwith space\n", "key 2")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_api_keys(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_api_keys(tmp_path / "none")


async def test_metrics_and_properties_by_llamacpps_names() -> None:
    async with real_engine() as (engine, _), client(make_app(engine, defaults={"temperature": 0.5, "seed": 7})) as http:
        for _ in range(2):
            await http.post("/completion", json={"prompt": "the quick brown fox jumps over it", "n_predict": 4})
        text = (await http.get("/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("llamacpp:"))
        assert float(values["llamacpp:tokens_predicted_total"]) == 8
        assert float(values["llamacpp:prompt_tokens_total"]) > 0 and float(values["llamacpp:n_decode_total"]) > 0
        assert float(values["llamacpp:prompt_seconds_total"]) > 0
        assert float(values["llamacpp:tokens_predicted_seconds_total"]) > 0
        assert float(values["llamacpp:n_tokens_max"]) >= 4 + 4 and "# TYPE llamacpp:n_tokens_max counter" in text
        assert float(values["llamacpp:n_busy_slots_per_decode"]) > 0
        assert float(values["llamacpp:requests_processing"]) == float(values["llamacpp:requests_deferred"]) == 0
        params = (await http.get("/props")).json()["default_generation_settings"]["params"]
        assert (params["temperature"], params["seed"], params["top_k"]) == (0.5, 7, 40)
