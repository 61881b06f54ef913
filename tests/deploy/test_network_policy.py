"""Tests of the chart's network policies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from support.kubernetes.charts import MATRIX, RELEASE, Manifest, containers, one, pod_templates, render


def policies(values: Mapping[str, Any]) -> dict[str, Manifest]:
    """Returns the specs of NetworkPolicies by the last part of their names."""
    found = [each for each in render(values) if each["kind"] == "NetworkPolicy"]
    return {each["metadata"]["name"].removeprefix(f"{RELEASE}-llamaclust-"): each["spec"] for each in found}


def test_the_api_is_open_to_the_namespace() -> None:
    def clients(values: Mapping[str, Any]) -> Any:
        (rule,) = (rule for rule in policies(values)["coordinator"]["ingress"] if rule["ports"][0]["port"] == 8080)
        return rule.get("from")

    assert clients({}) == [{"podSelector": {}}]
    assert clients({"networkPolicy": {"apiFrom": []}}) is None
    team = {"namespaceSelector": {"matchLabels": {"team": "chat"}}}
    own, other = clients({"networkPolicy": {"apiFrom": [team]}})
    assert other == team and own["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"


@pytest.mark.parametrize("ports", [(7102, 8102), (7200, 9000), (65535, 7102)])
def test_links_are_between_workers_alone(ports: tuple[int, int]) -> None:
    """The coordinator may connect only to the port for stages. Each worker's options name both ports."""
    stages, links = ports
    values = {"workers": {"port": stages, "linkPort": links}, "networkPolicy": {"restrictEgress": True}}
    callers = {
        rule["ports"][0]["port"]: [
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]
        ]
        for rule in policies(values)["worker"]["ingress"]
    }
    assert callers == {stages: ["coordinator", "worker"], links: ["worker"]}
    called = {
        name: [port["port"] for rule in spec["egress"] for port in rule.get("ports", ())]
        for name, spec in policies(values).items()
    }
    assert links in called["worker"] and links not in called["coordinator"]
    (pod,) = (pod for pod in pod_templates(render(values)) if "-worker" in pod.owner)
    (container,) = (each for each in containers(pod.spec) if each["name"] == "worker")
    assert [port["containerPort"] for port in container["ports"]] == [stages, links]
    assert f"--link-port={links}" in container["args"]


@pytest.mark.parametrize("name", ["defaults", "shared volume", "ray"])
def test_every_pod_may_ask_dns(name: str) -> None:
    """OpenShift's DNS pods listen on port 5353, and network plugins may compare the port behind the Service."""
    ports = [{"protocol": protocol, "port": port} for port in (53, 5353) for protocol in ("UDP", "TCP")]
    found = policies(MATRIX[name])
    assert {"coordinator", "worker"} <= found.keys()
    assert all({"ports": ports} in spec["egress"] for spec in found.values())


def downloads(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the peers to which each policy allows connections on port 443."""
    rules = [(name, rule) for name, spec in policies(values).items() for rule in spec["egress"]]
    return {name: rule.get("to") for name, rule in rules if {"protocol": "TCP", "port": 443} in rule.get("ports", ())}


def test_only_pods_that_download_may_call_out() -> None:
    shared = {"kind": "shared"}
    every = downloads({})
    assert every.keys() == {"coordinator", "worker"}, "each has a copy of its own"
    for peers in every.values():
        blocks = [peer["ipBlock"] for peer in peers]
        assert {"10.0.0.0/8", "169.254.0.0/16", "fc00::/7"} <= {one for block in blocks for one in block["except"]}
    assert downloads({"networkPolicy": {"downloadTo": []}}) == {}
    kept = {"kind": "hostPath", "hostPath": "/srv"}
    assert downloads({"model": {"volume": shared}}).keys() == {"pull"}
    assert downloads({"model": {"volume": kept}}).keys() == {"coordinator", "worker"}, "each node has its own"
    assert downloads({"model": {"pull": False, "source": "a.gguf", "volume": kept}}) == {}


def test_one_job_fetches_a_shared_model() -> None:
    """Serving pods mount the model read-only. Jobs are immutable, so another model or image gets another Job."""

    def job(values: Mapping[str, Any]) -> Manifest:
        return one(render({"model": {"volume": {"kind": "shared"}}, **values}), "Job", "pull")

    first = job({})
    assert first == job({"workers": {"count": 3}})
    changes: list[dict[str, Any]] = [
        {"image": {"tag": "2"}},
        {"model": {"source": "hf:a/b/c.gguf", "volume": {"kind": "shared"}}},
        {"coordinator": {"nodeSelector": {"disk": "fast"}}},
        {"security": {"user": 20001}},
        {"tmpSize": "2Gi"},
    ]
    jobs = [first, *map(job, changes)]
    pods = {json.dumps(each["spec"]["template"], sort_keys=True): each["metadata"]["name"] for each in jobs}
    assert len(set(pods.values())) == len(pods) >= len(changes)
    for pod in pod_templates(render(MATRIX["shared volume"])):
        for container in containers(pod.spec):
            for mount in container["volumeMounts"]:
                if mount["name"] == "models":
                    assert mount.get("readOnly", False) is ("-pull-" not in pod.owner), pod.owner
    named = [each["metadata"]["name"] for each in render() if each["kind"] == "Job"]
    assert named == [f"{RELEASE}-llamaclust-secrets"]
