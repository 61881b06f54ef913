"""Renders the Helm chart by a real helm; objects are dictionaries."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import ROOT

CHART = ROOT / "deploy/helm/llamaclust"
RELEASE = "lab"
NAMESPACE = "models"
IMAGE = {"image": {"repository": "registry.example/llamaclust"}}
Manifest = dict[str, Any]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader of libyaml if PyYAML has it; it takes a tenth of the time."""


@cache
def helm_binary() -> str:
    """Returns the helm that `make` put into the environment, or the system's; skips the test if there is none."""
    own = Path(sys.executable).parent / "helm"
    found = str(own) if own.is_file() else shutil.which("helm")
    if found is None:
        pytest.skip("no helm: `make .venv/.helm` fetches it (Linux on x86-64), or install one")
    return found


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Creates a folder that is removed at the end of this process."""
    return tempfile.TemporaryDirectory(prefix="helm-home-")


def _home() -> dict[str, str]:
    """Returns variables that hide the user's clusters and plugins from helm."""
    names = ("HOME", "HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")
    folder = _folder().name
    return dict.fromkeys(names, folder) | {"KUBECONFIG": f"{folder}/none", "PATH": os.environ["PATH"]}


def with_image(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the image, the only value without a default."""
    return {**values, "image": {**IMAGE["image"], **values.get("image", {})}}


def helm(
    *arguments: str, values: Mapping[str, Any] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a helm command with `values` as a file on its standard input."""
    return subprocess.run(
        [helm_binary(), *arguments, "-f", "-"],
        input=yaml.safe_dump(with_image(values or {})),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_home() | variables,
    )


def render(values: Mapping[str, Any] | None = None, *options: str) -> tuple[Manifest, ...]:
    """Returns all objects of the chart for these values; the caller may change them."""
    found: tuple[Manifest, ...] = pickle.loads(_rendered(json.dumps(values or {}), options))
    return found


@cache
def _rendered(values: str, options: tuple[str, ...]) -> bytes:
    """Renders objects once for all tests that need them."""
    done = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *options, values=json.loads(values))
    assert done.returncode == 0, done.stderr
    return pickle.dumps(tuple(one for one in yaml.load_all(done.stdout, _LOADER) if one))


def refusal(values: Mapping[str, Any]) -> str:
    """Returns helm's error message for invalid values."""
    done = helm("template", RELEASE, str(CHART), values=values)
    assert done.returncode != 0, f"accepted: {values}"
    return done.stderr


def one(manifests: Sequence[Manifest], kind: str, component: str | None = None) -> Manifest:
    """Returns the only object of a kind, or of a kind and component label."""
    found = [
        each
        for each in manifests
        if each["kind"] == kind
        and (component is None or each["metadata"]["labels"].get("app.kubernetes.io/component") == component)
    ]
    assert len(found) == 1, f"{len(found)} of kind {kind} {component or ''}"
    return found[0]


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    found = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of kind {kind} named {name}"
    return found[0]


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """A template of pods in an object of any kind."""

    owner: str  # kind and name
    labels: dict[str, str]
    spec: Manifest
    claims: tuple[Manifest, ...] = ()  # volume claim templates


def pod_templates(manifests: Sequence[Manifest]) -> Iterator[PodTemplate]:
    for each in manifests:
        owner, spec = f"{each['kind']}/{each['metadata']['name']}", each.get("spec", {})
        if each["kind"] == "Pod":
            yield PodTemplate(owner, each["metadata"]["labels"], spec)
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            claims = tuple(spec.get("volumeClaimTemplates", ()))
            yield PodTemplate(owner, spec["template"]["metadata"]["labels"], spec["template"]["spec"], claims)
        elif each["kind"] == "RayCluster":
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield PodTemplate(owner, group["template"]["metadata"]["labels"], group["template"]["spec"])


def containers(spec: Manifest) -> list[Manifest]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def cluster_file(manifests: Sequence[Manifest]) -> str:
    configs = [each for each in manifests if each["kind"] == "ConfigMap" and "cluster.yaml" in each["data"]]
    assert len(configs) == 1
    text: str = configs[0]["data"]["cluster.yaml"]
    return text


MATRIX: dict[str, Mapping[str, Any]] = {
    "defaults": {},
    "many workers": {"workers": {"count": 64, "threads": 8, "memory": "24GiB", "antiAffinity": "required"}},
    "own names": {"fullnameOverride": "brain", "serviceAccount": {"name": "thinker"}},
    "part of names": {"nameOverride": "a-name-that-is-as-long-as-it-may-be-40-x"},
    "shared volume": {"model": {"volume": {"kind": "shared", "size": "80Gi", "storageClass": "nfs"}}},
    "a model fetched once": {"model": {"pullers": "first"}, "workers": {"count": 3}},
    "claim with the model": {
        "model": {"pull": False, "source": "llama/8b.gguf", "volume": {"kind": "existingClaim", "claimName": "models"}}
    },
    "models on the nodes": {
        "model": {"pull": False, "source": "8b.gguf", "volume": {"kind": "hostPath", "hostPath": "/srv/models"}}
    },
    "nothing kept": {
        "coordinator": {"persistence": {"enabled": False}},
        "workers": {"persistence": {"enabled": False}},
    },
    "own secrets": {
        "certificateAuthority": {"existingSecret": "authority"},
        "joinToken": {"existingSecret": "join"},
        "apiKeys": {"existingSecret": "keys"},
    },
    "tls": {
        "tls": {"existingSecret": "api-tls"},
        "serviceMonitor": {"enabled": True},
        "networkPolicy": {"apiFrom": []},
    },
    "published": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "hosts": ["llm.example"],
            "tlsSecret": "llm-tls",
            "annotations": {"cert-manager.io/cluster-issuer": "letsencrypt"},
        },
        "networkPolicy": {"apiFrom": [{"namespaceSelector": {"matchLabels": {"name": "ingress-nginx"}}}]},
    },
    "node port": {
        "service": {"type": "NodePort", "nodePort": 30080, "annotations": {"a/b": "c"}},
        "networkPolicy": {"apiFrom": []},
    },
    "no policies": {
        "networkPolicy": {"enabled": False},
        "workers": {"podDisruptionBudget": {"enabled": False}, "antiAffinity": "none", "topologySpread": []},
        "serviceAccount": {"create": False},
    },
    "closed": {
        "networkPolicy": {
            "apiFrom": [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}],
            "extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
        },
        "coordinator": {"podDisruptionBudget": {"enabled": True}},
    },
    "watched": {
        "serviceMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
        "networkPolicy": {"apiFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    },
    "gpus": {
        "workers": {
            "gpu": {"count": 2, "layers": 20, "memory": "9GiB"},
            "runtimeClassName": "nvidia",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "nodeSelector": {"gpu": "h200"},
        }
    },
    "two kinds of workers": {
        "workers": {
            "count": 2,
            "groups": {
                "gpu": {
                    "count": 3,
                    "gpu": {"count": 1},
                    "runtimeClassName": "nvidia",
                    "nodeSelector": {"gpu": "yes"},
                    "resources": {"limits": {"memory": "32Gi"}},
                }
            },
        }
    },
    "placed": {
        "coordinator": {
            "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
            "extraEnv": [{"name": "TZ", "value": "UTC"}],
            "podAnnotations": {"a": "b"},
            "podLabels": {"c": "d"},
        },
        "workers": {"affinity": {"podAntiAffinity": {}}, "podLabels": {"c": "d"}, "podAnnotations": {"a": "b"}},
        "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": [{"name": "registry"}]},
        "security": {"user": None},
        "model": {"env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]},
    },
    "ray": {
        "ray": {"enabled": True},
        "workers": {"threads": 2, "memory": "3GiB", "persistence": {"storageClass": "local"}},
        "model": {"volume": {"kind": "shared"}},
    },
    "version six": {"ipv6": True},
    "two coordinators": {
        "coordinator": {"replicas": 2, "persistence": {"accessModes": ["ReadWriteMany"], "storageClass": "nfs"}},
        "networkPolicy": {"apiServer": [{"ipBlock": {"cidr": "10.96.0.1/32"}}]},
    },
    "settings of the cluster": {
        "config": {
            "context_length": 8192,
            "kv_type": "q8_0",
            "max_waiting": 100000,
            "objective": "throughput",
            "timeouts": {"request": "20min"},
            "plan": [{"worker": "lab-llamaclust-worker-0", "layers": [0, 30]}],
        }
    },
}
"""Values of the chart by test case."""
