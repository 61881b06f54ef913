"""Runs pods of rendered manifests as local processes, with commands, volumes and probes as a kubelet reads them.

Each pod has its own loopback address, and a folder for each volume, to which paths of the manifests are mapped.
"""

from __future__ import annotations

import base64
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from support.kubernetes.charts import Manifest, named

_INIT_S = 60.0


@dataclass
class LocalPod:
    """A pod: `prepare` runs its init containers, `start` its only other container."""

    name: str
    address: str
    spec: Manifest
    manifests: Sequence[Manifest]
    folder: Path
    services: dict[str, str]  # addresses of pods by names of Services
    process: subprocess.Popen[bytes] | None = None
    _folders: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        names = {mount["name"] for each in self._containers for mount in each["volumeMounts"]}
        for name in names:
            self._folders[name] = self.folder / name
            self._folders[name].mkdir(parents=True)
            self._fill(volumes.get(name, {}), self._folders[name])

    @property
    def _containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def main(self) -> Manifest:
        (container,) = self.spec["containers"]
        found: Manifest = container
        return found

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def volume(self, name: str) -> Path:
        return self._folders[name]

    def _fill(self, volume: Manifest, folder: Path) -> None:
        for source in volume.get("projected", {}).get("sources", (volume,)):
            if "secret" in source:
                secret = source["secret"]
                data = named(self.manifests, "Secret", secret.get("secretName") or secret["name"])["data"]
                for item in secret["items"]:
                    path = folder / item["path"]
                    path.write_bytes(base64.b64decode(data[item["key"]]))
                    path.chmod(0o440)
            elif "configMap" in source:
                for name, text in named(self.manifests, "ConfigMap", source["configMap"]["name"])["data"].items():
                    (folder / name).write_text(self.mapped(text, self.main))

    def mapped(self, text: str, container: Manifest) -> str:
        """Maps paths below mounts and Services to local ones, in one pass each, since results may match again."""
        places = {mount["mountPath"]: str(self.folder / mount["name"]) for mount in container["volumeMounts"]}
        paths = "|".join(re.escape(path) for path in sorted(places, key=len, reverse=True))
        text = re.sub(rf"(?<![\w/.-])({paths})(?![\w-])", lambda found: places[found[1]], text)
        hosts = "|".join(re.escape(name) for name in self.services)
        return re.sub(rf"(?<=[=/@])({hosts})(?=:\d)", lambda found: self.services[found[1]], text)

    def environment(self, container: Manifest) -> dict[str, str]:
        found = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for each in container.get("env", ()):
            value = each["value"] if "value" in each else self._from(each["valueFrom"], container)
            found[each["name"]] = self.mapped(value, container)
        return found

    def _from(self, source: dict[str, Any], container: Manifest) -> str:
        if "resourceFieldRef" in source:
            assert source["resourceFieldRef"] == {
                "containerName": container["name"],
                "resource": "requests.cpu",
                "divisor": "1",
            }
            return str(math.ceil(_cores(container["resources"]["requests"]["cpu"])))
        fields = {"metadata.name": self.name, "status.podIP": self.address}
        return fields[source["fieldRef"]["fieldPath"]]

    def command(self, container: Manifest) -> list[str]:
        """Returns the command that a kubelet would run: known variables are expanded, and others remain."""
        variables = self.environment(container)
        words = [*container["command"], *container.get("args", ())]
        put_in = [re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), word) for word in words]
        return [self.mapped(word, container) for word in put_in]

    def prepare(self) -> None:
        for container in self.spec.get("initContainers", ()):
            self.run(container)

    def run(self, container: Manifest) -> str:
        """Runs a container to its end, asserts that it succeeds, and returns its output."""
        command, variables = self.command(container), self.environment(container)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INIT_S, check=False, env=variables)
        assert done.returncode == 0, f"{self.name}/{container['name']}: {done.stderr}"
        return done.stdout

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(self.main), env=self.environment(self.main), stdout=log, stderr=log, cwd="/"
            )

    def probe(self, kind: str) -> bool:
        """Tells whether the container's probe of this kind succeeds now."""
        probe = self.main[kind]
        if "exec" in probe:
            command = [self.mapped(word, self.main) for word in probe["exec"]["command"]]
            return subprocess.run(command, timeout=10, check=False).returncode == 0
        ports = {port["name"]: port["containerPort"] for port in self.main["ports"]}
        url = f"http://{self.address}:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
        try:
            return 200 <= httpx.get(url, timeout=probe.get("timeoutSeconds", 1)).status_code < 400
        except httpx.HTTPError:
            return False

    def stop(self) -> int:
        """Stops the pod as if it was deleted, and returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(self.spec["terminationGracePeriodSeconds"])
        finally:
            self.process.kill()
            self.process.wait()


def _cores(quantity: str | float) -> float:
    text = str(quantity)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)
