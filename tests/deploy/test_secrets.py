"""Tests of the chart's secrets: a Job creates secrets that the program accepts, and no manifest has a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.kubernetes.charts import MATRIX, RELEASE, Manifest, one, pod_templates, render
from support.kubernetes.kubernetes_api import FakeApi, fake_api

pytest.importorskip("llamaclust.cluster.membership.authority", reason="this build has no launcher static")
x509 = pytest.importorskip("cryptography.x509")

AUTHORITY, JOIN, KEYS, RAY = (f"{RELEASE}-llamaclust-{end}" for end in ("authority", "join", "api-keys", "ray"))


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as server:
        yield server


def secret_names(spec: Manifest) -> set[str]:
    """Returns the names of secrets in a pod's volumes."""
    sources = [
        source for volume in spec["volumes"] for source in (volume, *volume.get("projected", {}).get("sources", ()))
    ]
    secrets = [source["secret"] for source in sources if "secret" in source]
    return {secret.get("secretName") or secret["name"] for secret in secrets}


@pytest.mark.parametrize("name", MATRIX)
def test_no_manifest_has_a_key(name: str) -> None:
    """Helm keeps manifests in its history. Two renderings are equal."""
    manifests = render(MATRIX[name])
    assert not [each for each in manifests if each["kind"] == "Secret"]
    assert manifests == render(MATRIX[name])


def test_the_program_takes_what_the_job_made(api: FakeApi, tmp_path: Path) -> None:
    from llamaclust.cluster.membership.authority import Authority
    from llamaclust.wire.security.certificates import ca_hash

    api.make_secrets(render(), tmp_path / "pod")
    assert api.secrets.keys() == {AUTHORITY, JOIN, KEYS}
    folder = tmp_path / "trust"
    folder.mkdir(mode=0o700)
    for name, text in (api.data(AUTHORITY) | api.data(JOIN)).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    authority = Authority.open(folder)
    assert authority.token.ca_hash == ca_hash(authority.certificate)
    signed = x509.load_pem_x509_certificate(authority.identity().pair.certificate)
    signed.verify_directly_issued_by(x509.load_der_x509_certificate(authority.certificate))
    keys = api.data(KEYS)
    assert keys["api-keys"] == keys["api-key"] and len(keys["api-key"]) == 43
    assert all(each["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE for each in api.secrets.values())


def test_an_upgrade_keeps_what_is_there(api: FakeApi, tmp_path: Path) -> None:
    api.make_secrets(render(), tmp_path / "install")
    first = dict(api.secrets)
    printed = api.make_secrets(render({"workers": {"count": 3}}), tmp_path / "upgrade")
    assert api.secrets == first and printed.count("kept") == 2 and "made" not in printed


def test_a_deleted_token_is_made_anew_for_the_same_authority(api: FakeApi, tmp_path: Path) -> None:
    """The same state remains if an earlier run ended between the creation of the two secrets."""
    api.make_secrets(render(), tmp_path / "install")
    first = api.data(JOIN)["token"].split(".")
    del api.secrets[JOIN]
    api.make_secrets(render(), tmp_path / "upgrade")
    second = api.data(JOIN)["token"].split(".")
    assert first[:2] == second[:2] and first[2] != second[2]


def test_the_authoritys_key_reaches_the_coordinator_alone(api: FakeApi, tmp_path: Path) -> None:
    for pod in pod_templates(render()):
        component = pod.labels["app.kubernetes.io/component"]
        assert (AUTHORITY in secret_names(pod.spec)) is (component == "coordinator"), pod.owner
    api.make_secrets(render(), tmp_path)
    assert api.data(JOIN).keys() == {"token"} and api.data(AUTHORITY).keys() == {"ca.crt", "ca.key"}


def test_the_jobs_account_may_do_what_it_does() -> None:
    manifests = render()
    create, get = one(manifests, "Role")["rules"]
    assert (create["resources"], create["verbs"]) == (["secrets"], ["create"])
    assert (get["verbs"], get["resourceNames"]) == (["get"], [AUTHORITY])
    account = one(manifests, "RoleBinding")["subjects"][0]["name"]
    users = [pod.owner for pod in pod_templates(manifests) if pod.spec["serviceAccountName"] == account]
    assert users == [f"Job/{RELEASE}-llamaclust-secrets"]
    for each in manifests:
        if each["metadata"]["name"] == account:
            assert each["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"


def test_a_ray_cluster_has_its_own(api: FakeApi, tmp_path: Path) -> None:
    api.make_secrets(render(MATRIX["ray"]), tmp_path)
    assert api.secrets.keys() == {KEYS, RAY} and len(api.data(RAY)["auth_token"]) == 43


def test_own_secrets_take_the_place_of_made_ones() -> None:
    manifests = render(MATRIX["own secrets"])
    assert not [each for each in manifests if each["kind"] == "Job"]
    assert secret_names(one(manifests, "Deployment")["spec"]["template"]["spec"]) == {"authority", "join", "keys"}
    assert secret_names(one(manifests, "StatefulSet")["spec"]["template"]["spec"]) == {"join"}


def test_without_permission_the_job_ends_with_one_line(api: FakeApi, tmp_path: Path) -> None:
    api.permits = False
    with pytest.raises(AssertionError, match="no Secrets can be made in namespace models: HTTP Error 403") as refused:
        api.make_secrets(render(), tmp_path)
    assert "Traceback" not in str(refused.value)
