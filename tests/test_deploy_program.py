"""What the chart renders is what the program takes: cluster file, commands, environment; and it works, as processes here."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from charts import MATRIX, RELEASE, Manifest, cluster_file, containers, named, one, pod_templates, render
from local_pods import LocalPod
from typer.main import get_command

from llamaclust.cli.app import app
from llamaclust.cluster.config import ClusterConfig, load_config
from llamaclust.errors import UsageError

NAME = f"{RELEASE}-llamaclust"
_START_S = 60.0
_PATHS = ("/var/lib/llamaclust", "/run/llamaclust")


def known_commands() -> dict[str, Any]:
    found: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return found


def loaded(manifests: tuple[Manifest, ...], folder: Path) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(cluster_file(manifests))
    return load_config(path)


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_the_cluster_file_is_one(values: Mapping[str, Any], tmp_path: Path) -> None:
    manifests = render(values)
    config = loaded(manifests, tmp_path)
    service = named(manifests, "Service", config.name)
    assert len(config.workers) == one(manifests, "StatefulSet")["spec"]["replicas"]
    assert config.api_keys_file == Path("/run/llamaclust/api-keys")
    names = {f"{service['metadata']['name']}.models.svc", *values.get("ingress", {}).get("hosts", ())}
    assert names <= set(config.allowed_hosts)
    ports = {port["name"]: port["containerPort"] for port in one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert (config.port, config.join.listen.rpartition(":")[2]) == (ports["api"], str(ports["join"]))
    assert config.join.members.rpartition(":")[2] == str(ports["control"])
    assert (config.host, config.join.listen.rpartition(":")[0]) == (("::", "[::]") if values.get("ipv6") else ("0.0.0.0",) * 2)


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_commands_are_the_programs(values: Mapping[str, Any]) -> None:
    """Every command line that begins with the program's name is parsed by the program."""
    seen = []
    for pod in pod_templates(render(values)):
        for container in containers(pod.spec):
            words = [*container["command"], *container.get("args", ())]
            if "llamaclust" in words[:3]:
                parsed = parse([word.replace("$(CORES)", "2") for word in words[words.index("llamaclust") + 1 :]])
                assert parsed, f"{pod.owner}: {words}"
                seen.append(parsed.pop("command"))
                assert all(each["name"] in ("HOME", "POD_NAME", "POD_IP", "CORES", "HTTPS_PROXY") or each["name"].startswith("LLAMACLUST_") for each in container["env"])
    pulls = values.get("model", {}).get("pull", True)
    assert sorted(seen) == sorted(["up", "worker", "generate", *(["pull"] * 2 if pulls else [])])


def parse(words: list[str]) -> dict[str, Any]:
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    with command.make_context(command.name, words) as context:
        return {"command": command.name, **context.params}


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["worker", "--join=a:1", "--tokenfile=x"])


def test_variables_are_the_programs() -> None:
    text = (Path(__file__).parent.parent / "cluster/config.py").read_text()
    for pod in pod_templates(render()):
        for container in containers(pod.spec):
            assert all(f'"{each["name"]}"' in text for each in container.get("env", ()) if each["name"].startswith("LLAMACLUST_"))


# -- a cluster of it -----------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """The first of a row of free ports, `count` times; two in a row are needed for enrolment and what follows it."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("0.0.0.0", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("0.0.0.0", port + 1))
            except OSError:
                continue
            found.append(port)
    return found


def eventually(check: Callable[[], bool], pods: list[LocalPod], what: str) -> None:
    end = time.monotonic() + _START_S
    while not check():
        ended = [pod for pod in pods if pod.process is not None and pod.process.poll() is not None]
        logs = "".join(f"\n--- {pod.name}\n{pod.log.read_text()}" for pod in pods if pod.log.exists())
        assert not ended and time.monotonic() < end, f"{what}: {logs}"
        time.sleep(0.1)


@pytest.fixture
def manifests() -> tuple[Manifest, ...]:
    api, join, grpc = free_ports(3)
    small = {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}
    values = {
        "coordinator": {"ports": {"api": api, "join": join}, "startupSeconds": 60},
        "workers": {"port": grpc, "preparedSize": "0", "resources": small},
        "service": {"port": api},
        "config": {"context_length": 512, "max_sequences": 2},
    }
    return render(values)


@pytest.fixture
def pods(manifests: tuple[Manifest, ...], tmp_path: Path, demo_model: Path) -> Iterator[list[LocalPod]]:
    """The coordinator's and two workers', the model where `model pull` would have put it; workers first, as it may happen."""
    services = {f"{NAME}-coordinator": "127.0.0.1", NAME: "127.0.0.1"}
    coordinator = one(manifests, "Deployment")["spec"]["template"]["spec"]
    workers = one(manifests, "StatefulSet")["spec"]
    specs = [(f"{NAME}-worker-{index}", f"127.0.0.{11 + index}", workers["template"]["spec"]) for index in range(workers["replicas"])]
    specs.append((f"{NAME}-coordinator-0", "127.0.0.1", coordinator))
    with ExitStack() as stack:
        found = []
        for name, address, spec in specs:
            pod = LocalPod(name, address, spec, manifests, tmp_path / name, services)
            (pod.volume("data") / "home").mkdir()
            (pod.volume("data") / "home/models").symlink_to(demo_model.parent.parent)
            pod.prepare()
            pod.start()
            stack.callback(pod.stop)
            found.append(pod)
        yield found


def test_rendered_pods_answer_as_local_processes(
    manifests: tuple[Manifest, ...], pods: list[LocalPod], tmp_path: Path
) -> None:
    coordinator = pods[-1]
    eventually(lambda: coordinator.probe("readinessProbe"), pods, "not ready")
    for pod in pods:
        assert all(pod.probe(kind) for kind in ("startupProbe", "readinessProbe", "livenessProbe")), pod.name
    test = one(manifests, "Pod")["spec"]
    asking = LocalPod("test", "127.0.0.1", test, manifests, tmp_path / "test", coordinator.services)
    answer = json.loads(asking.run(asking.main))
    assert "Paris" in answer["text"] and len(answer["token_ids"]) == 8
    assert coordinator.stop() == 0


def test_the_coordinators_secrets_are_its_own(pods: list[LocalPod]) -> None:
    private = pods[-1].volume("private")
    assert (private / "trust").stat().st_mode & 0o777 == 0o700
    for path in (private / "api-keys", private / "trust/ca.key", private / "trust/token"):
        assert path.stat().st_mode & 0o777 == 0o600
