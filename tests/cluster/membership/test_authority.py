"""Tests of a cluster's certificate authority and token on disk: made once, private, whole; it signs for one name."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.membership import authority as module
from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.server.front import cluster_record
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.regular_file import take_lock
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.certificates import NewKey, cluster_id
from llamaclust.wire.security.token import JoinToken
from llamaclust.worker.enrolment import enrol
from support.clusters.served import until
from support.wire.trust import authority, enrolment


def test_an_authority_is_the_same_at_every_start_and_private(tmp_path: Path) -> None:
    first, second = authority(tmp_path), authority(tmp_path)
    assert first.certificate == second.certificate and first.token == second.token
    assert first.cluster == cluster_id(first.token.ca_hash)
    (tmp_path / "trust" / "ca.key").chmod(0o640)
    with pytest.raises(UsageError, match="other users can read it"):
        authority(tmp_path)
    (tmp_path / "trust" / "ca.key").chmod(0o600)
    (tmp_path / "trust").chmod(0o750)
    with pytest.raises(UsageError, match="other users can read it"):
        authority(tmp_path)


def test_a_start_that_was_cut_short_leaves_no_half_of_an_authority(tmp_path: Path) -> None:
    (tmp_path / ".trust.new").mkdir()
    (tmp_path / ".trust.new" / "ca.key").write_text("half")
    authority(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trust"]


@pytest.mark.parametrize("has_own", [False, True])
def test_static_clusters_share_an_authority_unless_one_has_its_own(tmp_path: Path, *, has_own: bool) -> None:
    """A cluster of an earlier version keeps its own."""
    if has_own:
        (tmp_path / "first" / "trust").mkdir(parents=True)
    first, second = (module.trust_folder(tmp_path / name) for name in ("first", "second"))
    assert first == (tmp_path / "first" / "trust" if has_own else second)
    assert second == tmp_path / ".trust"


def test_clusters_that_start_at_once_make_one_authority(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = [*threads.map(lambda _: module.Authority.open(tmp_path / "state" / ".trust").token.text, range(8))]
    assert len(set(made)) == 1


def test_a_start_that_hangs_is_named_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_WAIT_S", 0.05)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert take_lock(descriptor)
        with pytest.raises(LlamaclustError, match=r"another process has locked it for 0\.05 s; try again later"):
            module.Authority.open(tmp_path / "trust")
    finally:
        os.close(descriptor)
    assert not (tmp_path / "trust").exists()


class Clock(datetime):
    """A machine's clock that is `ahead` of the real time."""

    ahead = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Clock:
        return super().now(tz) + cls.ahead


def test_an_authority_outlives_a_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(Clock, "ahead", timedelta(days=365))
    made = authority(tmp_path)
    for days in (0, -365, 1000):
        monkeypatch.setattr(Clock, "ahead", timedelta(days=days))
        assert authority(tmp_path).certificate == made.certificate
    monkeypatch.setattr(Clock, "ahead", timedelta(days=20 * 365))
    with pytest.raises(UsageError, match=r"this machine's clock says 20.*; set the clock, or remove the folder"):
        authority(tmp_path)


@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "token"])
def test_a_damaged_authority_is_named(name: str, tmp_path: Path) -> None:
    authority(tmp_path)
    other = authority(tmp_path, "other").token_file.with_name(name).read_bytes()
    for content in (b"", b"nonsense", other):
        (tmp_path / "trust" / name).write_bytes(content)
        with pytest.raises(UsageError, match=str(tmp_path / "trust")):
            authority(tmp_path)


async def test_a_token_file_that_hangs_does_not_stop_the_event_loop(
    trust: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Workers enrol with the last token meanwhile, and with a rotated one once the file can be read again."""
    back, read, old = threading.Event(), JoinToken.read, trust.token

    def hanging(path: Path) -> JoinToken:
        back.wait(60)
        return read(path)

    monkeypatch.setattr(JoinToken, "read", hanging)
    monkeypatch.setattr(module, "_READ_S", 0.2)
    try:
        async with asyncio.timeout(60), enrolment(trust) as (host, port):
            await asyncio.gather(*(enrol(host, port, old, name) for name in "ab"))
            assert not back.is_set()
            assert [record.message.rpartition(": ")[2] for record in caplog.records[:2]] == [
                f"reading {trust.token_file} took longer than 0.2 s",
                "[Errno 110] an earlier call has not returned",
            ]
            trust.rotate_token()
            back.set()
            await until(lambda: not trust._disk.hangs)
            monkeypatch.setattr(module, "_READ_S", 60)
            await enrol(host, port, read(trust.token_file), "a")
    finally:
        back.set()


def test_a_join_token_is_private_and_whole(tmp_path: Path, trust: Authority) -> None:
    text = trust.token.text
    assert JoinToken.read(trust.token_file) == trust.token and text.startswith("lc1.") and len(text) > 100
    assert trust.token.secret.decode() not in repr(trust.token)
    path = tmp_path / "copy"
    path.touch(mode=0o600)
    for wrong in ("", text[:-20], text.replace("lc1.", "lc2."), f"{text}\n{text}", text.replace(".", "-"), "x" * 2000):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="token file"):
            JoinToken.read(path)
    path.write_text(f"{text}\n")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        JoinToken.read(path)


def test_the_coordinators_name_is_no_workers(trust: Authority) -> None:
    named = {Principal(name).host(trust.cluster) for name in ("coordinator", "", "a")}
    assert COORDINATOR.host(trust.cluster) not in named


def test_a_certificate_is_for_its_name_and_nothing_more(trust: Authority) -> None:
    certificate = x509.load_der_x509_certificate(trust.certify(NewKey().request, Principal("b")))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName(f"b.worker.{trust.cluster}.llamaclust")]
    assert list(certificate.subject) == []
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_the_token_of_started_workers_is_kept_however_its_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path / "state"))
    folder = ClusterDir(tmp_path / "state" / "brain")
    folder.create()
    own, other = (Authority.open(path) for path in (folder.path / "trust", tmp_path / "secure"))
    monkeypatch.chdir(folder.path)
    workers = ["workers=[{name: a, threads: 1}]", "api_keys_file=keys.txt"]
    with folder.locked(), socket.socket() as listener:
        for trust, given, keys in ((own, "trust", []), (other, "../../secure", [f"join.trust_dir={tmp_path}/secure"])):
            config = load_config(None, ["name=brain", "launcher=ray", *workers, *keys])
            record = cluster_record(config, folder, ApiPort(listener))
            assert record.api_keys_file == str(folder.path / "keys.txt")
            folder.write_record(record)
            for options in ([], ["--cluster", "brain"], ["--trust-dir", given]):
                done = CliRunner().invoke(app, ["token", "rotate", *options])
                assert "stop the cluster first with `llamaclust down --cluster brain`" in str(done.exception)
            assert JoinToken.read(trust.token_file) == trust.token
