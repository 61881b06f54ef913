"""Secrets of the chart: what Helm makes is what the program takes, and stays as it is over upgrades."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
import yaml

from support.kubernetes.charts import CHART, NAMESPACE, RELEASE, Manifest, helm, named, one, render
from support.kubernetes.kubernetes_api import fake_api

JOIN, KEYS = f"{RELEASE}-llamaclust-join", f"{RELEASE}-llamaclust-api-keys"


def data(secret: Manifest) -> dict[str, str]:
    return {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}


def owned(secret: Manifest) -> Manifest:
    """As Helm leaves it in the cluster."""
    owner = {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE}
    return secret | {"metadata": secret["metadata"] | {"annotations": owner}}


def test_the_join_token_names_the_authority() -> None:
    secret = data(named(render(), "Secret", JOIN))
    body = "".join(line for line in secret["ca.crt"].splitlines() if not line.startswith("-"))
    token = re.fullmatch(r"lc1\.([0-9a-f]{64})\.([A-Za-z0-9_-]{43})", secret["token"])
    assert token is not None and token[1] == hashlib.sha256(base64.b64decode(body)).hexdigest()
    assert secret["ca.key"].startswith("-----BEGIN EC PRIVATE KEY-----\n")


def test_the_program_signs_with_what_helm_made(tmp_path: Path) -> None:
    """Certificates name the authority's key in the form of Helm's library, or verification would not find it."""
    trust = pytest.importorskip("llamaclust.cluster.membership.authority", reason="this build has no launcher static")
    x509 = pytest.importorskip("cryptography.x509")
    folder = tmp_path / "trust"
    folder.mkdir(mode=0o700)
    for name, text in data(named(render(), "Secret", JOIN)).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    authority = trust.Authority.open(folder)
    signed = x509.load_pem_x509_certificate(authority.identity().pair.certificate)
    ca = x509.load_der_x509_certificate(authority.certificate)
    signed.verify_directly_issued_by(ca)
    ours = signed.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert ours == ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.key_identifier


def test_every_release_has_secrets_of_its_own() -> None:
    first, second = render(), render()
    for name in (JOIN, KEYS):
        assert not set(data(named(first, "Secret", name)).values()) & set(data(named(second, "Secret", name)).values())
    keys = data(named(first, "Secret", KEYS))
    assert keys["api-keys"] == keys["api-key"] and len(keys["api-key"]) == 43


def test_own_secrets_take_the_place_of_made_ones() -> None:
    manifests = render({"joinToken": {"existingSecret": "join"}, "apiKeys": {"existingSecret": "keys"}})
    assert [each for each in manifests if each["kind"] == "Secret"] == []
    sources = {volume["name"]: volume for volume in one(manifests, "Deployment")["spec"]["template"]["spec"]["volumes"]}
    assert [each["secret"]["name"] for each in sources["secrets"]["projected"]["sources"]] == ["join", "keys"]


def test_an_upgrade_keeps_what_is_there(tmp_path: Path) -> None:
    """With a server that answers lookups, as in a real upgrade."""
    options = ("--dry-run=server", "--disable-openapi-validation")
    with fake_api(tmp_path) as (api, kubeconfig):
        arguments = ("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *options)

        def rendered() -> tuple[Manifest, ...]:
            done = helm(*arguments, KUBECONFIG=str(kubeconfig))
            assert done.returncode == 0, done.stderr
            return tuple(each for each in yaml.safe_load_all(done.stdout) if each)

        installed = rendered()
        assert any(path.endswith(f"/namespaces/{NAMESPACE}/secrets/{JOIN}") for path in api.asked)
        assert (
            named(rendered(), "Secret", JOIN)["data"] != named(installed, "Secret", JOIN)["data"]
        )  # nothing there yet
        api.secrets = {name: owned(named(installed, "Secret", name)) for name in (JOIN, KEYS)}
        for name in (JOIN, KEYS):
            assert named(rendered(), "Secret", name)["data"] == named(installed, "Secret", name)["data"]
