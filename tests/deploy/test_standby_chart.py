"""Tests of the chart with two coordinators. A Lease is their lock, and their token permits nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamaclust.cluster.config.cluster_config import load_config
from support.kubernetes.charts import (
    MATRIX,
    NAMESPACE,
    Manifest,
    cluster_file,
    containers,
    named,
    one,
    pod_templates,
    refusal,
    render,
)

TWO = MATRIX["two coordinators"]
NAME = "lab-llamaclust-coordinator"


@pytest.fixture(scope="module")
def manifests() -> tuple[Manifest, ...]:
    return render(TWO)


def test_one_coordinator_has_no_lease_and_no_token() -> None:
    alone = render()
    assert not {"Lease", "RoleBinding"} & {each["kind"] for each in alone if "annotations" not in each["metadata"]}
    assert "serviceAccountToken" not in json.dumps(one(alone, "Deployment"))
    assert "lease" not in yaml.safe_load(cluster_file(alone))
    deployment = one(alone, "Deployment")["spec"]
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}


def test_both_coordinators_share_state_and_are_apart(manifests: tuple[Manifest, ...]) -> None:
    deployment = one(manifests, "Deployment")["spec"]
    assert deployment["replicas"] == 2 and deployment["strategy"]["rollingUpdate"]["maxSurge"] == 0
    claim = named(manifests, "PersistentVolumeClaim", NAME)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = deployment["template"]
    (term,) = pod["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_their_account_may_update_one_lease(manifests: tuple[Manifest, ...]) -> None:
    assert named(manifests, "Lease", NAME)["apiVersion"] == "coordination.k8s.io/v1"
    rule = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "update"]}
    assert named(manifests, "Role", NAME)["rules"] == [rule | {"resourceNames": [NAME]}]
    binding = named(manifests, "RoleBinding", NAME)
    assert binding["roleRef"]["name"] == NAME
    account = one(manifests, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]


def test_only_the_coordinators_container_has_the_token(manifests: tuple[Manifest, ...]) -> None:
    holders = {
        (pod.labels["app.kubernetes.io/component"], container["name"])
        for pod in pod_templates(manifests)
        for container in containers(pod.spec)
        if any(mount["name"] == "account" for mount in container["volumeMounts"])
    }
    assert holders == {("coordinator", "coordinator"), ("secrets", "secrets")}


def test_the_cluster_file_names_the_lease(manifests: tuple[Manifest, ...], tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_file(manifests))
    lease = load_config(path).lease
    assert lease is not None and (lease.name, lease.namespace, lease.duration) == (NAME, NAMESPACE, 15.0)
    (mount,) = (
        mount
        for container in containers(one(manifests, "Deployment")["spec"]["template"]["spec"])
        for mount in container["volumeMounts"]
        if mount["name"] == "account"
    )
    assert str(lease.account) == mount["mountPath"] and lease.api == "https://kubernetes.default.svc"


def test_the_service_of_the_api_leaves_out_a_standby(manifests: tuple[Manifest, ...]) -> None:
    """A standby is alive but not ready. Workers find the listening coordinator through the other Service."""
    service = named(manifests, "Service", "lab-llamaclust")["spec"]
    assert "publishNotReadyAddresses" not in service
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/live", "readinessProbe": "/health", "livenessProbe": "/live"}


def test_they_reach_the_api_server(manifests: tuple[Manifest, ...]) -> None:
    policy = named(manifests, "NetworkPolicy", NAME)["spec"]
    ports = [{"protocol": "TCP", "port": port} for port in (443, 6443, 8443, 16443)]
    assert {"ports": ports, "to": [{"ipBlock": {"cidr": "10.96.0.1/32"}}]} in policy["egress"]
    values: dict[str, Any] = {"coordinator": TWO["coordinator"], "networkPolicy": {"apiServerPorts": [443]}}
    assert {"ports": ports[:1]} in named(render(values), "NetworkPolicy", NAME)["spec"]["egress"]
    worker = named(manifests, "NetworkPolicy", "lab-llamaclust-worker")["spec"]
    assert 6443 not in [port.get("port") for rule in worker["egress"] for port in rule.get("ports", ())]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"coordinator": {"replicas": 2}}, "share their state directory"),
        (
            {"coordinator": {"replicas": 2, "persistence": {"enabled": False, "accessModes": ["ReadWriteMany"]}}},
            "share their state directory",
        ),
        ({"coordinator": {"replicas": 3}}, "/coordinator/replicas"),
        ({"config": {"lease": {"name": "a"}}}, "'lease' not allowed"),
        ({"networkPolicy": {"apiServerPorts": []}}, "/networkPolicy/apiServerPorts"),
        (
            {"coordinator": TWO["coordinator"], "ray": {"enabled": True}, "workers": {"threads": 1}},
            "beside the head, of which there is one",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    assert said in refusal(values)
