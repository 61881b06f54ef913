"""Tests of the API's certificate: refused files, renewal, and the cluster's self-signed certificate."""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from llamaclust.cluster.front.http import certificate
from llamaclust.cluster.front.http import certificate as certificate_module
from llamaclust.cluster.front.http.certificate import (
    CertificateFiles,
    ServerCertificate,
    certificate_names,
    keep_self_signed,
)
from llamaclust.core.errors import UsageError
from llamaclust.core.interfaces import own_addresses
from support.wire.api_certificates import SignedFiles, self_signed, write_signed


def _missing(signed: SignedFiles) -> str:
    signed.files.certificate.unlink()
    return f"{signed.files.certificate} cannot be read: No such file"


def _no_certificate(signed: SignedFiles) -> str:
    signed.files.certificate.write_text("hello")
    return f"{signed.files.certificate} holds no certificate in PEM"


def _no_key(signed: SignedFiles) -> str:
    signed.files.key.write_bytes(signed.files.certificate.read_bytes())
    return f"{signed.files.key} holds no private key in PEM"


def _open_key(signed: SignedFiles) -> str:
    signed.files.key.chmod(0o644)
    return f"chmod o= {signed.files.key}"


def _folder(signed: SignedFiles) -> str:
    signed.files.key.unlink()
    signed.files.key.mkdir(mode=0o700)
    return f"{signed.files.key} cannot be read"


def _password(signed: SignedFiles) -> str:
    key = load_pem_private_key(signed.files.key.read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    signed.files.key.write_bytes(locked)
    return "protected by a password"


def _other_key(signed: SignedFiles) -> str:
    certificate = signed.files.certificate.read_bytes()
    write_signed(signed.files.key.parent)
    signed.files.certificate.write_bytes(certificate)
    return f"is not the key of the certificate in {signed.files.certificate}"


def _expired(signed: SignedFiles) -> str:
    write_signed(signed.files.key.parent, begin_days=-9, end_days=-1)
    return "renew it, or set the clock"


def _not_yet_valid(signed: SignedFiles) -> str:
    write_signed(signed.files.key.parent, begin_days=1)
    return "is valid from"


@pytest.mark.parametrize(
    "spoil",
    [_missing, _no_certificate, _no_key, _open_key, _folder, _password, _other_key, _expired, _not_yet_valid],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(spoil: Callable[[SignedFiles], str], tmp_path: Path) -> None:
    signed = write_signed(tmp_path)
    reason = spoil(signed)
    with pytest.raises(UsageError) as refused:
        ServerCertificate(signed.files)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_group_may_read_the_key(tmp_path: Path) -> None:
    """Checks that a key of mode 440 is accepted, which keys in volumes of secrets have."""
    signed = write_signed(tmp_path)
    signed.files.key.chmod(0o440)
    assert ServerCertificate(signed.files).context.minimum_version is ssl.TLSVersion.TLSv1_2


def looks(certificate: ServerCertificate) -> None:
    """Looks twice, which is enough to find files that have changed and are complete."""
    for _ in range(2):
        certificate.look()


def test_renewed_files_are_taken_once_both_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    signed = write_signed(tmp_path)
    certificate = ServerCertificate(signed.files)
    certificate.publish(tmp_path / "shown.crt")
    before, context = certificate.fingerprint, certificate.context
    looks(certificate)
    assert certificate.context is context
    former_key = signed.files.key.read_bytes()
    write_signed(tmp_path)
    key = signed.files.key.read_bytes()
    signed.files.key.write_bytes(former_key)
    certificate.look()  # in the middle of a renewal
    signed.files.key.write_bytes(key)
    assert not caplog.messages
    looks(certificate)
    assert certificate.fingerprint != before and certificate.context is not context
    assert "new certificate" in caplog.text
    assert (tmp_path / "shown.crt").read_text() in signed.files.certificate.read_text()


def test_a_renewal_that_fails_is_logged_once_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    signed = write_signed(tmp_path)
    certificate = ServerCertificate(signed.files)
    before = certificate.fingerprint
    signed.files.certificate.unlink()
    for _ in range(3):
        looks(certificate)
    (message,) = caplog.messages
    assert "keeps its previous certificate" in message and "No such file" in message
    assert certificate.fingerprint == before
    write_signed(tmp_path)
    looks(certificate)
    assert certificate.fingerprint != before


def test_a_renewal_that_fails_for_a_passing_reason_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> ssl.SSLContext:
        raise OSError(errno.ENOSPC, "No space left on device")

    certificate = ServerCertificate(write_signed(tmp_path).files)
    before = certificate.fingerprint
    write_signed(tmp_path)
    monkeypatch.setattr(certificate_module, "server_context", full)
    looks(certificate)
    (message,) = caplog.messages
    assert "keeps its previous certificate" in message and "No space left" in message
    certificate._retry_at_s = 0.0  # a minute later
    monkeypatch.setattr(certificate_module, "server_context", dict[bytes, object]().__getitem__)
    looks(certificate)
    certificate._retry_at_s = 0.0
    monkeypatch.undo()
    looks(certificate)
    assert certificate.fingerprint != before


def test_a_certificate_that_cannot_be_published_is_used_and_published_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificate_module, "_RETRY_S", 0.0)
    signed, published = write_signed(tmp_path), tmp_path / "shown" / "api.crt"
    published.parent.mkdir()
    certificate = ServerCertificate(signed.files)
    certificate.publish(published)
    before = certificate.fingerprint
    write_signed(tmp_path)
    published.unlink()
    published.mkdir()
    for _ in range(2):
        looks(certificate)
    assert certificate.fingerprint != before
    (message,) = caplog.messages
    assert f"could not be published to this user's programs: {published}: cannot be written" in message
    published.rmdir()
    looks(certificate)
    assert published.read_text() in signed.files.certificate.read_text()


def test_the_end_of_a_certificate_is_announced_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate = ServerCertificate(write_signed(tmp_path, end_days=5).files)
    looks(certificate)
    (message,) = caplog.messages
    assert "renew it" in message
    write_signed(tmp_path, end_days=60)
    looks(certificate)
    assert len(caplog.messages) == 1


def test_links_that_lead_elsewhere_are_a_change(tmp_path: Path) -> None:
    """Replaces a link to a folder, like in Kubernetes' volumes and in certbot's folder."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_signed(tmp_path / name)
    link = tmp_path / "live"
    link.symlink_to(tmp_path / "old")
    certificate = ServerCertificate(CertificateFiles(link / "tls.crt", link / "tls.key"))
    before = certificate.fingerprint
    (tmp_path / "next").symlink_to(tmp_path / "new")
    (tmp_path / "next").replace(link)
    looks(certificate)
    assert certificate.fingerprint != before


# -- self-signed -------------------------------------------------------------------------------------------------------


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_self_signed_certificate_is_made_once_and_private(tmp_path: Path) -> None:
    first = self_signed(tmp_path)
    assert (tmp_path / "api.pem").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE KEY" not in (tmp_path / "api.crt").read_bytes()
    assert self_signed(tmp_path).fingerprint == first.fingerprint
    found = read(tmp_path / "api.crt")
    assert found.not_valid_after_utc - found.not_valid_before_utc < timedelta(days=825)
    assert first.fingerprint.count(":") == 31


def test_a_new_name_makes_a_new_certificate_that_keeps_the_former_names(tmp_path: Path) -> None:
    first = self_signed(tmp_path, ("localhost", "10.0.0.5"))
    second = self_signed(tmp_path, ("localhost", "llm.example"))
    assert second.fingerprint != first.fingerprint
    names = read(tmp_path / "api.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "llm.example"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.5"]
    assert self_signed(tmp_path, ("10.0.0.5",)).fingerprint == second.fingerprint


def test_other_spellings_of_an_address_need_no_new_certificate(tmp_path: Path) -> None:
    path = tmp_path / "api.pem"
    keep_self_signed(path, certificate_names(["2001:DB8:0:0::1"], []))
    made = path.read_bytes()
    keep_self_signed(path, certificate_names(["2001:db8::1"], ["2001:0db8::0001"]))
    assert path.read_bytes() == made


def test_a_damaged_or_ending_certificate_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "api.pem"
    path.write_text("damaged")
    self_signed(tmp_path)

    class Later(datetime):
        @classmethod
        def now(cls, zone: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=800)

    monkeypatch.setattr(certificate, "datetime", Later)
    keep_self_signed(path, ["localhost"])
    assert read(path).not_valid_after_utc > datetime.now(UTC) + timedelta(days=1600)


def test_names_are_those_by_which_clients_may_call() -> None:
    local = certificate_names(["127.0.0.1"], ("LLM.example", "*", "bad name"))
    assert local[:3] == ["localhost", "127.0.0.1", "::1"] and "llm.example" in local
    assert not {"*", "bad name"} & set(local) and len(set(local)) == len(local)
    assert set(own_addresses()) <= set(certificate_names(["0.0.0.0"], ()))
    assert "10.1.2.3" in certificate_names(["10.1.2.3"], ())
    both = certificate_names(["127.0.0.1", "10.1.2.3", "10.1.2.4"], ())
    assert {"10.1.2.3", "10.1.2.4"} < set(both)
