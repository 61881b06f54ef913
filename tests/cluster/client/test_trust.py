"""Tests of the certificates that clients trust; a cluster on this machine is known by its own, whatever its names."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from llamaclust import AsyncClient
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.cluster.client.web_access import trust
from llamaclust.cluster.front.http.certificate import ServerCertificate
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.interfaces import own_addresses
from support.clusters.served import CONTEXT, ScriptedEngine, make_app, says, serving
from support.wire.api_certificates import write_signed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterDir:
    """Creates the folder of a cluster of this user."""
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path / "state"))
    folder = ClusterDir(tmp_path / "state" / "home")
    folder.create()
    return folder


@asynccontextmanager
async def recorded(folder: ClusterDir, certificate: ServerCertificate) -> AsyncIterator[str]:
    async with serving(make_app(ScriptedEngine(says("Hi"))), certificate=certificate) as url:
        path = str(folder.api_certificate)
        folder.write_record(ClusterRecord("home", os.getpid(), url, "tiny", api_certificate=path))
        yield url


async def answer(url: str) -> str:
    async with AsyncClient(url) as client:
        return (await client.generate("a", max_tokens=9)).text


async def test_an_address_of_this_machine_is_pinned_to_its_certificate(folder: ClusterDir, tmp_path: Path) -> None:
    """Checks that the cluster's certificate is trusted under any name, and another one of the same authority is not."""
    certificate = ServerCertificate(write_signed(tmp_path, ("llm.example",)).files)
    certificate.publish(folder.api_certificate)
    async with recorded(folder, certificate) as url:
        assert await answer(url) == await answer(url.replace("127.0.0.1", "localhost")) == "Hi"
        record = folder.read_record()
        assert record is not None
        with ClusterApi.of(record) as api:
            assert await asyncio.to_thread(api.context_length) == CONTEXT
        killed = ClusterDir(folder.path.with_name("gone"))  # a former cluster at this address
        killed.create()
        killed.write_record(replace(record, name="gone", api_certificate=str(killed.api_certificate)))
        ServerCertificate(write_signed(tmp_path).files).publish(killed.api_certificate)
        assert await answer(url) == "Hi"
        killed.remove_record()
    other = ServerCertificate(write_signed(tmp_path).files)
    async with recorded(folder, other) as url:
        with pytest.raises(LlamaclustError, match="not trusted here"):
            await answer(url)


async def test_a_client_follows_a_renewal(folder: ClusterDir, tmp_path: Path) -> None:
    certificate = ServerCertificate(write_signed(tmp_path).files)
    certificate.publish(folder.api_certificate)
    async with recorded(folder, certificate) as url:
        context = trust(httpx.URL(url), None)
        for _ in range(2):
            async with httpx.AsyncClient(verify=context, trust_env=False) as http:
                assert (await http.get(f"{url}/health")).status_code == 200
            write_signed(tmp_path)
            for _ in range(2):
                certificate.look()


async def test_a_former_certificate_is_trusted_no_more(folder: ClusterDir, tmp_path: Path) -> None:
    certificate = ServerCertificate(write_signed(tmp_path).files)
    certificate.publish(folder.api_certificate)
    async with recorded(folder, certificate) as url:
        context = trust(httpx.URL(url), None)
        async with httpx.AsyncClient(verify=context, trust_env=False) as http:
            assert (await http.get(f"{url}/health")).status_code == 200
        ServerCertificate(write_signed(tmp_path).files).publish(folder.api_certificate)
        async with httpx.AsyncClient(verify=context, trust_env=False) as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.get(f"{url}/health")


@pytest.mark.parametrize(
    ("api", "url", "is_its"),
    [
        ("https://0.0.0.0:8443", "https://0.0.0.0:8443", True),
        ("https://[::]:8443", "https://[::]:8443", True),
        ("https://0.0.0.0:8443", "https://localhost:8443", True),
        ("https://0.0.0.0:8443", f"https://{own_addresses()[0]}:8443", True),
        ("https://0.0.0.0:8443", "https://203.0.113.9:8443", False),
        ("https://[::]:443", "https://[::1]", True),
        ("https://203.0.113.9:8443", "https://203.0.113.9:8443", True),
        ("https://203.0.113.9:8443", "https://localhost:8443", False),
        ("https://127.0.0.1:8443", "https://localhost:8444", False),
    ],
)
def test_which_addresses_are_those_of_a_cluster_on_this_machine(
    folder: ClusterDir, tmp_path: Path, api: str, url: str, is_its: bool
) -> None:
    ServerCertificate(write_signed(tmp_path).files).publish(folder.api_certificate)
    path = str(folder.api_certificate)
    folder.write_record(ClusterRecord("home", os.getpid(), api, "tiny", api_certificate=path))
    context = trust(httpx.URL(url), None)
    assert context.check_hostname is not is_its


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("hello")
    for path, reason in ((tmp_path / "none.pem", "No such file"), (damaged, "holds no certificate in PEM")):
        with pytest.raises(UsageError, match=reason):
            trust(httpx.URL("https://llm.example"), path)
    assert trust(httpx.URL("http://127.0.0.1"), None).get_ca_certs() == []


def test_authorities_of_the_system_are_trusted_elsewhere(folder: ClusterDir) -> None:
    context = trust(httpx.URL("https://llm.example"), None)
    assert context.check_hostname
