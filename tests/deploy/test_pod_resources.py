"""Tests of the resources of the chart's pods: processors, memory, volumes and disk of the node."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from support.kubernetes.charts import MATRIX, RELEASE, cluster_file, containers, one, pod_templates, render


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_no_pod_may_fill_the_disk_of_its_node(values: Mapping[str, Any]) -> None:
    for pod in pod_templates(render(values)):
        for volume in pod.spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], (pod.owner, volume["name"])
        for container in containers(pod.spec):
            for kind in ("requests", "limits"):
                assert container["resources"][kind]["ephemeral-storage"], (pod.owner, container["name"])


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_a_volume_is_mounted_directly_below_another(values: Mapping[str, Any]) -> None:
    """Container runtimes create folders between two mounts as root, and then the program could not write to them."""
    for pod in pod_templates(render(values)):
        for container in containers(pod.spec):
            places = {PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"]}
            below = {folder for place in places for folder in place.parents if places & {*folder.parents}}
            assert below <= places, pod.owner
            homes = [one["value"] for one in container.get("env", ()) if one["name"] == "LLAMACLUST_HOME"]
            for mount in container["volumeMounts"]:
                assert mount["name"] != "models" or mount["mountPath"] == f"{homes[0]}/models", pod.owner


def test_ephemeral_storage_follows_from_what_is_kept() -> None:
    """A pod whose volumes are full stays within its limit."""

    def storage(size: str, persistent: bool) -> tuple[int, int]:
        values = {"tmpSize": "256Mi", "workers": {"persistence": {"enabled": persistent, "size": size}}}
        (container,) = one(render(values), "StatefulSet")["spec"]["template"]["spec"]["containers"]
        resources = container["resources"]
        return int(resources["requests"]["ephemeral-storage"]), int(resources["limits"]["ephemeral-storage"])

    tmp = 256 << 20
    assert storage("2Gi", True) == (tmp, tmp)
    assert storage("2Gi", False) == (tmp + (2 << 30),) * 2
    assert storage("1.5G", False) == (tmp + 1_500_000_000,) * 2
    assert storage("12345678", False) == (tmp + 12345678,) * 2
    own = {"workers": {"resources": {"limits": {"ephemeral-storage": "9Gi"}}}}
    (container,) = one(render(own), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "1Gi", "ephemeral-storage": "9Gi"}


@pytest.mark.parametrize("values", [MATRIX["defaults"], MATRIX["ray"]], ids=["pods", "ray"])
def test_workers_have_the_variables_that_users_add(values: Mapping[str, Any]) -> None:
    added = {"name": "TZ", "value": "UTC"}
    pods = pod_templates(render({**values, "workers": {**values.get("workers", {}), "extraEnv": [added]}}))
    every = [container for pod in pods for container in pod.spec["containers"]]
    found = [container["name"] for container in every if added in container.get("env", ())]
    assert found == ["worker"]


def test_one_worker_fetches_the_model_where_others_fetch_layers_from_it() -> None:
    """Runs the init container's command with the names of several pods."""
    manifests = render(MATRIX["a model fetched once"])
    spec = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    (model,) = (container for container in spec["initContainers"] if container["name"] == "model")
    assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in model["env"]
    *shell, wait, seconds, program, model_word, pull, source = model["command"]
    assert [wait, seconds, program, model_word, pull] == ["timeout", "3600", "llamaclust", "model", "pull"]
    pods = [f"{RELEASE}-llamaclust-worker{pod}" for pod in ("-0", "-1", "-gpu-0")]
    pulled = []
    for pod in pods:
        environment = {"POD_NAME": pod, "PATH": os.environ["PATH"]}
        done = subprocess.run([*shell, "echo", source], env=environment, stdout=subprocess.PIPE, check=True)
        pulled.append(done.stdout)
    assert pulled == [b"smollm2-135m-instruct\n", b"", b""]
    sizes = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
    assert sizes["LLAMACLUST_WEIGHTS_SIZE"] == "1024MiB", "what packed layers leave of 2Gi"
    coordinator = one(manifests, "Deployment")["spec"]["template"]["spec"]["initContainers"]
    assert any(container["command"][2:] == ["llamaclust", "model", "pull", source] for container in coordinator)


def test_several_models_are_fetched_and_served() -> None:
    entries = [{"model": "hf:a/b/c.gguf", "name": "c", "keep_alive": "5min"}, {"model": "smollm2-135m-instruct"}]
    manifests = render({"models": entries})
    assert yaml.safe_load(cluster_file(manifests))["models"] == entries
    sources = [entry["model"] for entry in entries]
    for kind in ("Deployment", "StatefulSet"):
        found = one(manifests, kind)["spec"]["template"]["spec"]["initContainers"]
        (model,) = (container for container in found if container["name"] == "model")
        assert model["command"] == ["timeout", "3600", "llamaclust", "model", "pull", *sources]
    shared = render({"models": entries, "model": {"volume": {"kind": "shared"}}})
    found = one(shared, "Deployment")["spec"]["template"]["spec"]["initContainers"]
    (waiting,) = (container for container in found if container["name"] == "model")
    assert waiting["args"][1:] == ["sh", *sources]
    kept = {"pull": False, "volume": {"kind": "hostPath", "hostPath": "/srv"}}
    mounted = yaml.safe_load(cluster_file(render({"models": [{"model": "a.gguf"}], "model": kept})))
    assert mounted["models"] == [{"model": "/var/lib/llamaclust/models/a.gguf"}] and "model" not in mounted


def test_the_defaults_are_for_a_small_cluster() -> None:
    """The defaults are documented in docs/several-machines.md#kubernetes and fit a cluster on a laptop."""
    cpu_m = memory = storage = 0
    for each in render():
        spec, copies = each.get("spec", {}), 1
        if each["kind"] in ("Deployment", "StatefulSet"):
            copies = spec["replicas"]
            (container,) = spec["template"]["spec"]["containers"]
            requests = container["resources"]["requests"]
            cpu_m += copies * millicores(requests["cpu"])
            memory += copies * mebibytes(requests["memory"])
        claims = [each] if each["kind"] == "PersistentVolumeClaim" else spec.get("volumeClaimTemplates", ())
        storage += sum(copies * mebibytes(claim["spec"]["resources"]["requests"]["storage"]) for claim in claims)
    assert (cpu_m, memory, storage) == (2500, 2560, 6144)


def millicores(quantity: str) -> int:
    return int(quantity.removesuffix("m")) if quantity.endswith("m") else 1000 * int(quantity)


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]
