"""Tests of the Helm chart: for many values, Kubernetes accepts the objects, and the objects match each other."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes_validate import utils as kubernetes

from support.kubernetes.charts import (
    CHART,
    MATRIX,
    RELEASE,
    Manifest,
    PodTemplate,
    cluster_file,
    containers,
    helm,
    one,
    pod_templates,
    refusal,
    render,
)
from support.paths import ROOT

VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
OURS = {"ServiceMonitor", "RayCluster"}
"""Kinds that are not part of Kubernetes. Their schemas are in tests/data/deploy."""
matrix = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())


@cache
def rendered(name: str) -> tuple[Manifest, ...]:
    return render(MATRIX[name])


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Any:
    """Caches schema files, because each validation would read megabytes again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes, "schema_contents", cache(kubernetes.schema_contents))
        yield


def validate(manifest: Manifest, version: str) -> None:
    if manifest["kind"] in OURS:
        schema = json.loads((ROOT / f"tests/data/deploy/{manifest['kind'].lower()}.schema.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(manifest)
        for template in pod_templates([manifest]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": template.spec}
            kubernetes.validate(pod, version, strict=True)
    else:
        assert kubernetes.validate(manifest, version, strict=True) == version


@matrix
def test_lint(values: Mapping[str, Any]) -> None:
    done = helm("lint", "--strict", str(CHART), values=values)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_uninstall_keeps_every_volume() -> None:
    every = (manifest for name in MATRIX for manifest in rendered(name))
    claims = [manifest["metadata"] for manifest in every if manifest["kind"] == "PersistentVolumeClaim"]
    assert {claim["name"].rpartition("-")[2] for claim in claims} == {"coordinator", "models"}
    assert all(claim["annotations"]["helm.sh/resource-policy"] == "keep" for claim in claims)


def test_a_rollout_may_take_as_long_as_a_download_and_a_start() -> None:
    values = {"model": {"pullSeconds": 1000}, "coordinator": {"startupSeconds": 2000}}
    assert one(render(values), "Deployment")["spec"]["progressDeadlineSeconds"] == 3120


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_kubernetes_takes_every_object(version: str) -> None:
    assert len(MATRIX) >= 12
    seen = {}
    for name in MATRIX:
        for manifest in rendered(name):
            seen[json.dumps(manifest, sort_keys=True)] = manifest
    assert len(seen) > 60
    for manifest in seen.values():
        validate(manifest, version)


def test_strict_validation_notices_a_wrong_key() -> None:
    deployment = json.loads(json.dumps(one(rendered("defaults"), "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(Exception, match="readynessProbe"):
        validate(deployment, VERSIONS[0])
    monitor = json.loads(json.dumps(one(rendered("watched"), "ServiceMonitor")))
    monitor["spec"]["endpoint"] = []
    with pytest.raises(jsonschema.ValidationError, match="endpoint"):
        validate(monitor, VERSIONS[0])


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"worker": {}}, "'worker' not allowed"),
        ({"workers": {"replicas": 2}}, "'replicas' not allowed"),
        ({"coordinator": {"resources": {"limit": {}}}}, "'limit' not allowed"),
        ({"config": {"context_lengh": 1}}, "'context_lengh' not allowed"),
        ({"config": {"model": "x"}}, "'model' not allowed"),
        ({"config": {"api_keys_file": "/x"}}, "'api_keys_file' not allowed"),
        ({"config": {"context_length": 0}}, "/config/context_length"),
        ({"config": {"timeouts": {"reqest": "1s"}}}, "'reqest' not allowed"),
        ({"workers": {"count": 0}}, "/workers/count"),
        ({"workers": {"count": "2"}}, "got string, want integer"),
        ({"workers": {"memory": "8Gi"}}, "/workers/memory"),
        ({"workers": {"persistence": {"size": "8GiB"}}}, "/workers/persistence/size"),
        ({"workers": {"kvDiskSize": "1.5GiB"}}, "2Gi is less than packedCacheSize 1GiB and kvDiskSize 1.5GiB"),
        ({"workers": {"kvDiskSize": "1 GiB", "gpu": {"count": 1}}}, "without GPUs"),
        ({"workers": {"groups": {"more": {"kvDiskSize": "1GiB"}}}}, "by all workers or none"),
        ({"workers": {"antiAffinity": "hard"}}, "/workers/antiAffinity"),
        ({"coordinator": {"ports": {"api": 80}}}, "/coordinator/ports/api"),
        ({"coordinator": {"ports": {"api": 7101}}}, "7101"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"image": {"repository": ""}}, "no image is published"),
        ({"model": {"volume": {"kind": "nfs"}}}, "/model/volume/kind"),
        ({"model": {"volume": {"kind": "existingClaim"}}}, "which claim"),
        ({"model": {"volume": {"kind": "hostPath"}}}, "which folder"),
        ({"model": {"pull": False}}, "model.volume.kind"),
        ({"model": {"pullers": "none"}}, "/model/pullers"),
        ({"model": {"pullers": "first", "volume": {"kind": "shared"}}}, "with model.volume.kind perPod"),
        ({"model": {"pull": False, "volume": {"kind": "shared"}}}, "no .gguf file"),
        ({"ingress": {"enabled": True}}, "under which names"),
        ({"ingress": {"tlsSecret": "x"}}, "no Ingress"),
        ({"service": {"nodePort": 30000}}, "ClusterIP has none"),
        ({"networkPolicy": {"enabled": False, "apiFrom": [{"podSelector": {}}]}}, "there is no policy"),
        ({"ingress": {"enabled": True, "hosts": ["llm.example"]}}, "networkPolicy.apiFrom"),
        ({"service": {"type": "LoadBalancer"}}, "networkPolicy.apiFrom"),
        ({"serviceMonitor": {"enabled": True}}, "networkPolicy.apiFrom"),
        ({"workers": {"resources": {"requests": None}}}, "workers.threads"),
        ({"security": {"user": 0}}, "/security/user"),
        ({"ray": {"enabled": True}}, "workers.threads"),
        ({"ray": {"enabled": True}, "workers": {"threads": 1}, "joinToken": {"existingSecret": "a"}}, "no join token"),
        ({"joinToken": {"existingSecret": "a"}}, "certificateAuthority.existingSecret"),
    ],
    ids=str,
)
def test_what_is_unknown_or_wrong_is_refused(values: Mapping[str, Any], said: str) -> None:
    assert said in refusal(values)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("defaults", "curl http://127.0.0.1"),
        ("tls", "curl --insecure https://127.0.0.1"),
        ("published", "https://llm.example"),
        ("ray", "raycluster/"),
    ],
)
def test_notes_say_how_to_ask(name: str, said: str) -> None:
    done = helm("install", RELEASE, str(CHART), "--dry-run=client", values=MATRIX[name])
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert said in notes and "/v1/completions" in notes and "{{" not in notes


def test_readme_and_schema_are_in_step() -> None:
    """Fails if `make chart` was not run after a change of values.yaml, README.md.in or the cluster file's keys."""
    generated = runpy.run_path(str(ROOT / "deploy/helm/generate.py"), run_name="generate")
    assert (CHART / "README.md").read_text() == generated["readme"]()
    assert (CHART / "values.schema.json").read_text() == generated["schema"]()


def test_every_value_is_in_the_schema_and_used() -> None:
    generated = runpy.run_path(str(ROOT / "deploy/helm/generate.py"), run_name="generate")
    listed = {value.name for value in generated["values"]((CHART / "values.yaml").read_text())}
    schema = json.loads((CHART / "values.schema.json").read_text())
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file())
    for name in listed:
        part = schema
        for word in name.split("."):
            assert word in part["properties"], name
            part = part["properties"][word]
        assert re.search(rf"\.{name.split('.')[-1]}\b", templates), f"{name} changes nothing"
    assert len(listed) > 70


def test_every_form_of_source_is_named() -> None:
    generated = runpy.run_path(str(ROOT / "deploy/helm/generate.py"), run_name="generate")
    (meaning,) = (
        each.meaning for each in generated["values"]((CHART / "values.yaml").read_text()) if each.name == "model.source"
    )
    for form in ("catalog name", "hf:OWNER/NAME/FILE[@REVISION]", "https", "pypi:PACKAGE==VERSION/FILE"):
        assert form in meaning


# -- objects that fit each other ---------------------------------------------------------------------------------------


@matrix
def test_names_and_selectors_fit(values: Mapping[str, Any]) -> None:
    manifests = render(values)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(names) == len(set(names))
    assert all(len(name) <= 57 and name.startswith(tuple("abcdefghijklmnopqrstuvwxyz")) for _, name in names)
    assert all("namespace" not in each["metadata"] for each in manifests)  # Helm sets the namespace.
    for each in manifests:
        if each["kind"] in ("Deployment", "StatefulSet"):
            selector = each["spec"]["selector"]["matchLabels"]
            assert selector.items() <= each["spec"]["template"]["metadata"]["labels"].items()
            assert "app.kubernetes.io/version" not in selector  # A selector cannot be changed later.
    for selector in selectors(manifests):
        assert len({pod.labels["app.kubernetes.io/component"] for pod in behind(selector, manifests)}) == 1, selector


def behind(selector: Mapping[str, str], manifests: tuple[Manifest, ...]) -> list[PodTemplate]:
    return [pod for pod in pod_templates(manifests) if selector.items() <= pod.labels.items()]


def selectors(manifests: tuple[Manifest, ...]) -> list[dict[str, str]]:
    """Returns all selectors of the coordinator's or the workers' pods."""
    found = [each["spec"]["selector"] for each in manifests if each["kind"] == "Service"]
    found += [each["spec"]["selector"]["matchLabels"] for each in manifests if each["kind"] == "PodDisruptionBudget"]
    for each in manifests:
        if each["kind"] == "NetworkPolicy":
            rules = [*each["spec"].get("ingress", ()), *each["spec"].get("egress", ())]
            peers = [peer for rule in rules for peer in (*rule.get("from", ()), *rule.get("to", ()))]
            own = [{"podSelector": each["spec"]["podSelector"]}, *(peer for peer in peers if peer.get("podSelector"))]
            labels = [peer["podSelector"]["matchLabels"] for peer in own]
            found += [one for one in labels if one["app.kubernetes.io/component"] != "test"]
    return found


@matrix
def test_references_lead_somewhere(values: Mapping[str, Any]) -> None:
    """Volumes, claims, secrets, accounts and ports that an object refers to exist."""
    manifests = render(values)
    there = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    outside = {"models", "authority", "join", "keys", "registry", "api-tls"}  # MATRIX refers to these existing objects.
    outside |= {
        word.partition("=")[2] for pod in pod_templates(manifests) for word in pod.spec["containers"][0].get("args", ())
    }
    for pod in pod_templates(manifests):
        volumes = {volume["name"] for volume in pod.spec["volumes"]} | {one["metadata"]["name"] for one in pod.claims}
        mounts = {mount["name"] for container in containers(pod.spec) for mount in container["volumeMounts"]}
        assert mounts == volumes, pod.owner
        for kind, wanted in referenced(pod.spec):
            assert (kind, wanted) in there or wanted in outside, f"{pod.owner}: {kind} {wanted}"
        account = pod.spec["serviceAccountName"]
        assert ("ServiceAccount", account) in there or account == "default"
    for each in manifests:
        if each["kind"] == "Service":
            pods = behind(each["spec"]["selector"], manifests)
            assert pods
            for pod in pods:
                ports = {port["name"] for container in pod.spec["containers"] for port in container.get("ports", ())}
                assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports
        if each["kind"] == "StatefulSet":
            assert ("Service", each["spec"]["serviceName"]) in there


def referenced(spec: Manifest) -> list[tuple[str, str]]:
    found = []
    for volume in spec["volumes"]:
        for source in (volume, *volume.get("projected", {}).get("sources", ())):
            if "secret" in source:
                found.append(("Secret", source["secret"].get("secretName") or source["secret"]["name"]))
        if "configMap" in volume:
            found.append(("ConfigMap", volume["configMap"]["name"]))
        if "persistentVolumeClaim" in volume:
            found.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    return found


@matrix
def test_no_pod_may_do_more_than_it_must(values: Mapping[str, Any]) -> None:
    """Pods meet Kubernetes's restricted security standard and have a read-only root file system."""
    for spec in (pod.spec for pod in pod_templates(render(values))):
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            allowed = container["securityContext"]
            assert allowed["readOnlyRootFilesystem"] is True and allowed["allowPrivilegeEscalation"] is False
            assert allowed["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in allowed and "runAsUser" not in allowed
            assert container["resources"]["requests"]["cpu"] and container["resources"]["limits"]["memory"]


def test_secrets_reach_only_files() -> None:
    """No environment variable or command line has a secret. Only init containers mount the Secret's volume."""
    for pod in (*pod_templates(rendered("defaults")), *pod_templates(rendered("ray"))):
        assert "secretKeyRef" not in json.dumps(pod.spec)
        if pod.labels["app.kubernetes.io/component"] != "test":
            mounts = [mount["name"] for container in pod.spec["containers"] for mount in container["volumeMounts"]]
            assert "secrets" not in mounts


def test_a_change_of_the_cluster_file_starts_the_coordinator_anew() -> None:
    def checksum(values: Mapping[str, Any]) -> str:
        template = one(render(values), "Deployment")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum({}) == checksum({"config": {}}) != checksum({"config": {"context_length": 1024}})


def test_workers_can_join_before_the_coordinator_is_ready() -> None:
    services = {each["metadata"]["name"]: each["spec"] for each in rendered("defaults") if each["kind"] == "Service"}
    headless = [f"{RELEASE}-llamaclust-coordinator", f"{RELEASE}-llamaclust-workers"]
    for name in headless:
        assert services[name]["clusterIP"] == "None" and services[name]["publishNotReadyAddresses"] is True
    assert "publishNotReadyAddresses" not in services[f"{RELEASE}-llamaclust"]


@pytest.mark.parametrize("own", [{}, {"ray": {"enabled": True}, "workers": {"threads": 1}}], ids=["static", "ray"])
def test_kv_memory_on_disk_is_a_value_of_all_workers(own: Mapping[str, Any]) -> None:
    manifests = render({**own, "workers": {"kvDiskSize": "1GiB", **own.get("workers", {})}})
    if own:
        assert {worker["kv_disk"] for worker in yaml.safe_load(cluster_file(manifests))["workers"]} == {"1GiB"}
        return
    (container,) = one(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert "--kv-disk=1GiB" in container["args"]
    home = next(variable["value"] for variable in container["env"] if variable["name"] == "LLAMACLUST_HOME")
    assert any(home.startswith(mount["mountPath"]) for mount in container["volumeMounts"] if mount["name"] == "data")
    assert "kv-disk" not in str(render())


def test_gpus_are_limits_of_the_workers_alone() -> None:
    manifests = rendered("gpus")
    worker = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    assert worker["containers"][0]["resources"]["limits"] == {
        "memory": "1Gi",
        "nvidia.com/gpu": "2",
        "ephemeral-storage": str(1 << 30),
    }
    assert {"--device=cuda:0,cuda:1", "--gpu-layers=20", "--gpu-memory=9GiB"} <= set(worker["containers"][0]["args"])
    assert "nvidia.com/gpu" not in json.dumps(one(manifests, "Deployment"))


def test_groups_of_workers_are_of_one_cluster() -> None:
    manifests = rendered("two kinds of workers")
    sets = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "StatefulSet"}
    plain, gpus = (sets.pop(f"{RELEASE}-llamaclust-worker{end}") for end in ("", "-gpu"))
    assert not sets and (plain["replicas"], gpus["replicas"]) == (2, 3)
    config = next(each["data"]["cluster.yaml"] for each in manifests if "cluster.yaml" in each.get("data", {}))
    assert yaml.safe_load(config)["workers"] == 5
    alike = render({"workers": {"count": 2, "groups": {"more": {"threads": 1}}}})
    assert [each["spec"]["replicas"] for each in alike if each["kind"] == "StatefulSet"] == [2, 2]
    assert "workers: 4\n" in next(
        each["data"]["cluster.yaml"] for each in alike if "cluster.yaml" in each.get("data", {})
    )
    pod, gpu_pod = plain["template"]["spec"], gpus["template"]["spec"]
    assert "--device=cuda:0" in gpu_pod["containers"][0]["args"] and gpu_pod["runtimeClassName"] == "nvidia"
    assert not [one for one in pod["containers"][0]["args"] if "gpu" in one or "cuda" in one]
    assert gpu_pod["containers"][0]["resources"]["limits"] == {
        "memory": "32Gi",
        "nvidia.com/gpu": "1",
        "ephemeral-storage": str(1 << 30),
    }
    assert (
        pod["containers"][0]["resources"]["limits"] == {"memory": "1Gi", "ephemeral-storage": str(1 << 30)}
        and "nodeSelector" not in pod
    )
    labels, gpu_labels = plain["template"]["metadata"]["labels"], gpus["template"]["metadata"]["labels"]
    assert plain["selector"]["matchLabels"].items() <= labels.items() and "llamaclust/group" not in labels
    assert gpus["selector"]["matchLabels"]["llamaclust/group"] == gpu_labels["llamaclust/group"] == "gpu"
    assert gpu_labels["app.kubernetes.io/component"] == "worker", "policies and services hold for it as well"
    assert "workers.groups: workers that Ray places are all alike" in refusal(
        {"ray": {"enabled": True}, "workers": {"threads": 2, "groups": {"gpu": {}}}}
    )
    assert "groups" in refusal({"workers": {"groups": {"gpu": {"groups": {}}}}})
    assert "'much-too-long'" in refusal({"workers": {"groups": {"much-too-long": {}}}})
    assert "take shorter names" in refusal({"fullnameOverride": "a" * 40, "workers": {"groups": {"large": {}}}})


def test_the_boards_file_is_in_the_config_map() -> None:
    boards = [each for each in rendered("watched") if "llamaclust.json" in each.get("data", {})]
    assert [json.loads(board["data"]["llamaclust.json"]) for board in boards] == [
        json.loads((CHART / "files/dashboard.json").read_text())
    ]


def test_the_form_of_logs_reaches_every_container() -> None:
    variable = {"name": "LLAMACLUST_LOG", "value": "json"}
    for template in pod_templates(render({"logFormat": "json"})):
        for container in containers(template.spec):
            if any(one["name"] == "LLAMACLUST_STATE_DIR" for one in container.get("env", [])):
                assert variable in container["env"], (template.owner, container["name"])
    assert "logFormat" in refusal({"logFormat": "xml"})
