"""Tests of an API at several addresses, during its start and afterwards."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.front.http.connections import ApiPort, listening
from llamaclust.cluster.front.http.server import StartingReplies, server_config
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.errors import UsageError
from support.clusters.served import ScriptedEngine, client, make_app, says, until
from support.network.loopback import free_port, has_ipv6_loopback

HERE = ("127.0.0.1", "127.0.0.2")


async def statuses(port: ApiPort, path: str) -> list[int]:
    async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
        places = [":".join(map(str, listener.getsockname()[:2])) for listener in port.listeners]
        return [(await http.get(f"http://{place}{path}")).status_code for place in places]


async def test_every_address_answers() -> None:
    settings = ApiSettings(further_hosts=HERE[1:])
    with listening([(host, 0) for host in HERE], None) as port:
        assert port.url.startswith("http://127.0.0.1:") and len(port.listeners) == 2
        async with StartingReplies(port, settings, lambda event: None):
            assert await statuses(port, "/v1/models") == [503, 503]
        server = uvicorn.Server(server_config(make_app(ScriptedEngine(says("Yes."))), settings, port))
        task = asyncio.create_task(server.serve(sockets=port.listeners))
        try:
            await until(lambda: server.started)
            assert await statuses(port, "/v1/models") == [200, 200]
        finally:
            server.should_exit = server.force_exit = True
            await task


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_clients_of_both_families_are_answered_at_all_addresses(host: str) -> None:
    settings = ApiSettings(listen_host=host, api_keys=("some-api-key",))
    with listening([(host, 0)], None) as port:
        number = port.listener.getsockname()[1]
        assert port.url == f"http://0.0.0.0:{number}"  # exists without IPv6, too
        async with StartingReplies(port, settings, lambda event: None), httpx.AsyncClient(trust_env=False) as http:
            hosts = (*HERE, "0.0.0.0", *(["[::1]"] if has_ipv6_loopback() else []))
            urls = [f"http://{each}:{number}/v1/models" for each in hosts]
            assert [(await http.get(url)).status_code for url in urls] == [503] * len(urls)


def test_an_address_that_is_taken_frees_the_others() -> None:
    number = free_port()
    with socket.create_server((HERE[1], number)):
        addresses = [(host, number) for host in HERE]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.2 port {number}"), listening(addresses, None):
            pass
        socket.create_server((HERE[0], number)).close()


async def test_parts_of_replies_do_not_wait_for_acknowledgements() -> None:
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listening([("127.0.0.1", 0)], None) as port:
        async with await asyncio.start_server(connected, sock=port.listener):
            _, writer = await asyncio.open_connection(*port.listener.getsockname())
            assert await asyncio.wait_for(accepted, 60) == 1
            writer.close()


async def test_any_address_that_others_reach_takes_requests_by_its_number() -> None:
    app = make_app(ScriptedEngine(says("Yes.")), further_hosts=("0.0.0.0",))
    async with client(app) as http:
        replies = [await http.get("/v1/models", headers={"Host": host}) for host in ("10.1.2.3:80", "rebound.example")]
    assert [reply.status_code for reply in replies] == [200, 403]


def config(folder: Path, more: str) -> Any:
    path = folder / "cluster.yaml"
    path.write_text(f"name: a\nmodel: m.gguf\nworkers: [{{name: a}}]\n{more}\n")
    return load_config(path)


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    several = config(tmp_path, "listen: 127.0.0.1:8000\nlisten_also: ['[::1]:8000', '127.0.0.2:0']")
    assert several.addresses == (("127.0.0.1", 8000), ("::1", 8000), ("127.0.0.2", 0))
    with pytest.raises(UsageError, match=r"listen_also.*10\.0\.0\.5:8000 can be reached from other machines"):
        config(tmp_path, "listen_also: ['[::1]:8000', '10.0.0.5:8000']")
