"""Tests of the Helm chart with TLS for the API."""

from __future__ import annotations

import yaml

from support.kubernetes.charts import MATRIX, cluster_file, one, render


def test_an_api_with_tls_is_probed_watched_and_tested_so() -> None:
    manifests = render(MATRIX["tls"])
    assert yaml.safe_load(cluster_file(manifests))["listen_tls"] == {
        "certificate": "/run/tls/tls.crt",
        "key": "/run/tls/tls.key",
    }
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{name}Probe"]["httpGet"]["scheme"] for name in ("startup", "readiness", "liveness")]
    assert probes == ["HTTPS"] * 3
    (endpoint,) = one(manifests, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["scheme"] == "https" and endpoint["tlsConfig"]["ca"]["secret"]["name"] == "api-tls"
    test = next(each for each in manifests if each["kind"] == "Pod")
    arguments = test["spec"]["containers"][0]["args"]
    assert endpoint["tlsConfig"]["serverName"] in arguments[0] and arguments[0].startswith("--endpoint=https://")
    assert "--ca-file=/run/tls/ca.crt" in arguments
