"""Tests of `up --lan`: the printed address and key work on another machine, and answers have the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.state.api_keys import named_keys
from support.clusters.command_line import command_line, float32
from support.network.box import Box
from support.network.distant_cluster import SPEED, TOKENS, Answer, eight

SERVER, PHONE = "server", "phone"
KEYS: dict[str, Any] = {"workers": [{"name": "a", "threads": 1, **SPEED}], "context_length": 512}


def docker(box: Box) -> None:
    """Adds a Docker bridge that precedes eth0 in the list of interfaces and has a lower address."""
    box.configure(SERVER, "link add docker0 index 99 type bridge", "addr add 10.17.0.1/16 dev docker0")
    box.configure(SERVER, "link set docker0 up", "link set eth0 down")
    box.configure(SERVER, "link set eth0 up")


def ipv6_alone(box: Box) -> None:
    for number, name in enumerate(box.hosts, 1):
        box.configure(name, "addr flush dev eth0", f"addr add fd77::{number}/64 dev eth0 nodad")


def both_families(box: Box) -> None:
    for number, name in enumerate(box.hosts, 1):
        box.configure(name, f"addr add fd77::{number}/64 dev eth0 nodad")


def ipv4_alone(box: Box) -> None:
    """Removes all IPv6 addresses, including loopback's."""
    for name in box.hosts:
        box[name].command("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")


PLACES = {"docker0": docker, "IPv6 alone": ipv6_alone, "both": both_families, "IPv4 alone": ipv4_alone}


def on_the_phone(box: Box, url: str, path: str, **given: Any) -> httpx.Response:
    def request() -> httpx.Response:
        with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as http:
            return http.request("POST" if "json" in given else "GET", path, **given)

    return box[PHONE].call(request)


@pytest.mark.parametrize("listen", ["127.0.0.1:8080", "[::1]:8080", None], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_phone_uses_what_is_printed(
    small_model: Path, small_answers: list[Answer], place: Callable[[Box], None], listen: str | None
) -> None:
    with Box((SERVER, PHONE)) as box, command_line() as line:
        place(box)
        keys = KEYS if listen is None else {**KEYS, "listen": listen}
        port = ["--port", "8080"] if listen is None else []
        file = line.cluster_file(small_model, "tiny", **keys)
        up = line.start("up", file, "--lan", *port, network=box[SERVER].namespace)
        up.says("API key: ")
        said = up.err.read_text()
        url = re.search(r"phones and other computers of this network: (\S+)", said)
        assert url is not None, said
        _, key = named_keys(line.state_dir / "api-keys")
        assert key.name == "lan" and key.key not in said  # The output is a file, not a terminal.
        assert f"the line below `# lan` in {line.state_dir}/api-keys" in said
        page = on_the_phone(box, url[1], "/", headers={"Accept": "text/html"})
        assert page.status_code == 200 and "<html" in page.text
        own = {"Authorization": f"Bearer {key.key}", "Origin": url[1].rstrip("/")}
        bodies = [each.body for each in eight(TOKENS)[:2]]
        assert on_the_phone(box, url[1], "/v1/completions", json=bodies[0]).status_code == 401
        for body, answer in zip(bodies, small_answers, strict=False):
            reply = on_the_phone(box, url[1], "/v1/completions", json=body, headers=own).json()["choices"][0]
            assert Answer(tuple(reply["token_ids"]), tuple(float32(reply["logprobs"]["token_logprobs"]))) == answer


def test_without_a_network_it_says_so(small_model: Path) -> None:
    with Box((SERVER, PHONE)) as box, command_line() as line:
        box.configure(SERVER, "addr flush dev eth0")
        up = line.start("up", line.cluster_file(small_model, "tiny", **KEYS), "--lan", network=box[SERVER].namespace)
        up.says("other computers of this network: cannot reach this machine, which has no network address")
