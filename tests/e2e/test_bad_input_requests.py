"""Tests of invalid, hostile and excessive requests to a real cluster: each is refused, and other requests continue."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from support.clusters.command_line import Cluster, CommandLine, command_line, eventually, paused
from support.models.hostile_models import tiny

CONTEXT = 2048
RUNNING, WAITING = 2, 1
TEMPLATE = (
    "{% set word = messages[0].content %}"
    "{% if word == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if word == 'fill' %}{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endif %}"
    "{% if word == 'hoard' %}{% set n = namespace(all=['a' * 1000]) %}"
    "{% for a in range(99999) %}{% set n.all = n.all + n.all %}{% endfor %}{% endif %}"
    "{% if word == 'escape' %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endif %}"
    "{{ bos_token + word }}"
)
LONG = {"prompt": "the", "max_tokens": CONTEXT, "ignore_eos": True, "stream": True}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        yield line


@pytest.fixture(scope="module")
def cluster(line: CommandLine) -> Iterator[Cluster]:
    """Yields a cluster, and checks at the end that its log has no traceback."""
    model = tiny(line.folder / "model.gguf", extra={"tokenizer.chat_template": TEMPLATE})
    with line.cluster(model, max_sequences=RUNNING, max_waiting=WAITING) as cluster:
        yield cluster
        assert cluster.status["state"] == "ready"
        assert "Traceback" not in cluster.command.err.read_text()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> tuple[list[int], list[float]]:
    return cluster.answer()


def said(word: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": word}], "max_tokens": 4, "temperature": 0}


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1000
    assert "\n" not in error["message"]
    return error


REFUSED: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "longer than the context": ({"prompt": "the " * CONTEXT}, str(CONTEXT)),
    "no prompt": ({"prompt": []}, "prompt"),
    "empty prompt": ({"prompt": "", "add_special_tokens": False}, "empty"),
    "unknown token": ({"prompt": [1, 99999]}, "99999"),
    "a text for max_tokens": ({"prompt": "a", "max_tokens": "12"}, "max_tokens"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    "infinity": (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    "long stop": ({"prompt": "a", "stop": "x" * (1 << 20)}, "stop"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "deep"),
    "half a surrogate": (b'{"prompt": "\\ud800"}', "JSON"),
    "not JSON": (b"{", "JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "JSON"),
    "unsupported field": ({"prompt": "a", "suffix": "b"}, "suffix"),
    "body without end": (b"[" + b" " * (17 << 20), str(16 << 20)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_request_is_refused_and_the_next_one_answered(
    cluster: Cluster, undisturbed: tuple[list[int], list[float]], name: str
) -> None:
    body, says = REFUSED[name]
    if isinstance(body, bytes):
        reply = cluster.http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    else:
        reply = cluster.http.post(COMPLETIONS, json=body)
    assert reply.status_code == (413 if name == "body without end" else 400), reply.text
    assert says in error_of(reply)["message"]
    assert cluster.answer() == undisturbed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": "a b"}, 400),
        ({"origin": "https://evil.example"}, 403),
    ],
)
def test_foreign_hosts_and_pages_are_refused(cluster: Cluster, headers: dict[str, str], status: int) -> None:
    for path in ("/health", "/cluster", "/v1/models"):
        reply = cluster.http.get(path, headers=headers)
        assert reply.status_code == status
        error_of(reply)


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01" * 9, b"GET /\0 HTTP/1.1\r\n\r\n", b"A" * 200_000])
def test_what_is_no_http_ends_its_own_connection(cluster: Cluster, garbage: bytes) -> None:
    host, _, port = cluster.api.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as connection, suppress(ConnectionError):
        connection.sendall(garbage)
        while connection.recv(1 << 16):
            pass
    assert cluster.http.get("/health").status_code == 200


@pytest.mark.parametrize("word", ["fill", "hoard", "escape"])
def test_a_hostile_template_costs_its_own_request_alone(
    cluster: Cluster, undisturbed: tuple[list[int], list[float]], word: str
) -> None:
    reply = cluster.http.post(CHAT, json=said(word))
    assert reply.status_code == 400 and "chat template" in error_of(reply)["message"]
    assert cluster.http.post(CHAT, json=said("hello")).status_code == 200
    assert cluster.answer() == undisturbed


def test_others_are_answered_while_a_template_loops_for_ever(
    cluster: Cluster, undisturbed: tuple[list[int], list[float]]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        loops = pool.submit(cluster.http.post, CHAT, json=said("loop"))
        answers = [cluster.answer()]
        assert not loops.done()
        chat = pool.submit(cluster.http.post, CHAT, json=said("hello"))
        answers += [cluster.answer() for _ in range(4)]
        assert answers == [undisturbed] * 5
        stopped = loops.result(60.0)  # 400 if its processor time is spent, and 504 if a busy machine gave it less.
        assert stopped.status_code in (400, 504), stopped.text
        assert "the model's chat template was stopped" in error_of(stopped)["message"]
        assert chat.result(60.0).status_code == 200


def test_a_full_queue_answers_429_and_takes_requests_again(cluster: Cluster) -> None:
    with ExitStack() as streams:
        replies = []
        for _ in range(RUNNING + WAITING):
            replies.append(streams.enter_context(cluster.http.stream("POST", COMPLETIONS, json=LONG)))
        eventually(lambda: cluster.status["requests"] == {"running": RUNNING, "waiting": WAITING}, 60.0, "a full queue")
        assert [reply.status_code for reply in replies] == [200] * len(replies)
        refused = cluster.http.post(COMPLETIONS, json={"prompt": "a"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        many = cluster.http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]})
        assert many.status_code == 429
    eventually(lambda: cluster.status["requests"] == {"running": 0, "waiting": 0}, 60.0, "an empty queue")
    assert cluster.answer()


def test_a_client_that_disconnects_frees_its_memory(cluster: Cluster) -> None:
    aborted = cluster.metric('llamaclust_requests_total{finish_reason="abort"}')
    b = cluster.worker_pids["b"]
    with cluster.http.stream("POST", COMPLETIONS, json=LONG) as reply:
        lines = reply.iter_lines()
        assert next(lines)
        with paused(b):  # The request must not finish before the checks.
            assert cluster.metric('llamaclust_kv_blocks{state="used"}') > 0
            assert cluster.status["requests"]["running"] == 1
    eventually(lambda: cluster.metric('llamaclust_kv_blocks{state="used"}') == 0, 60.0, "free KV memory")
    assert cluster.metric('llamaclust_requests_total{finish_reason="abort"}') == aborted + 1
    assert cluster.metric("llamaclust_requests_running") == 0


def test_a_client_that_disconnects_while_it_waits_for_everything_frees_its_memory(cluster: Cluster) -> None:
    aborted = cluster.metric('llamaclust_requests_total{finish_reason="abort"}')
    host, _, port = cluster.api.removeprefix("http://").rpartition(":")
    body = json.dumps({**LONG, "stream": False}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with (
        paused(cluster.worker_pids["b"]),  # The request must not finish before its client disconnects.
        socket.create_connection((host, int(port)), timeout=10.0) as connection,
    ):
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: cluster.status["requests"]["running"] == 1, 60.0, "a running request")
    eventually(lambda: cluster.status["requests"] == {"running": 0, "waiting": 0}, 60.0, "no requests")
    eventually(lambda: cluster.metric('llamaclust_kv_blocks{state="used"}') == 0, 60.0, "free KV memory")
    assert cluster.metric('llamaclust_requests_total{finish_reason="abort"}') == aborted + 1
