"""Tests of the chart's manifests with the program: it accepts their commands, and answers as processes of this
machine."""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.main import get_command

from llamaclust.cli.app import app
from llamaclust.cluster.config import environment as environment_module
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.core.errors import UsageError
from support.kubernetes.charts import (
    MATRIX,
    RELEASE,
    Manifest,
    cluster_file,
    containers,
    named,
    one,
    pod_templates,
    render,
)
from support.kubernetes.kubernetes_api import fake_api
from support.kubernetes.local_pods import LocalPod
from support.network.loopback import free_port

NAME = f"{RELEASE}-llamaclust"
_START_S = 180.0
_OWN_VARIABLES = {"HOME", "POD_NAME", "POD_IP", "CORES", "HTTPS_PROXY", "TZ"}
matrix = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())


def need_launcher(name: str) -> None:
    """Skips the test if this build does not have the launcher."""
    if name not in json.dumps(ClusterConfig.model_json_schema()["properties"]["launcher"]):
        pytest.skip(f"this build has no launcher {name}")


def launcher_of(values: Mapping[str, Any]) -> str:
    return "ray" if values.get("ray", {}).get("enabled") else "static"


def loaded(manifests: Sequence[Manifest], folder: Path) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(cluster_file(manifests))
    return load_config(path)


@matrix
def test_the_cluster_file_is_one(values: Mapping[str, Any], tmp_path: Path) -> None:
    need_launcher(launcher_of(values))
    manifests = render(values)
    config = loaded(manifests, tmp_path)
    assert named(manifests, "Service", config.name)
    assert config.launcher == launcher_of(values)
    if config.launcher == "ray":  # `auto` would start another Ray cluster until the pod's head is up.
        head = one(manifests, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert config.ray.address == f"127.0.0.1:{head['ports'][0]['containerPort']}"
    more = sum(group["count"] for group in values.get("workers", {}).get("groups", {}).values())
    assert len(config.workers) == values.get("workers", {}).get("count", 2) + more
    assert config.api_keys_file == Path("/run/llamaclust/api-keys")
    assert {config.name, f"{config.name}.models.svc", *values.get("ingress", {}).get("hosts", ())} <= set(
        config.allowed_hosts
    )
    assert config.host == ("::" if values.get("ipv6") else "0.0.0.0")


@matrix
def test_ports_of_the_cluster_file_are_the_pods(values: Mapping[str, Any], tmp_path: Path) -> None:
    need_launcher("static")
    if launcher_of(values) != "static":
        return
    manifests = render(values)
    config = loaded(manifests, tmp_path)
    (coordinator,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in coordinator["ports"]}
    told = {"join": config.join.listen, "control": config.join.members, "api": config.listen}
    assert {name: int(address.rpartition(":")[2]) for name, address in told.items()} == ports
    assert {address.rpartition(":")[0] for address in told.values()} == {"[::]" if values.get("ipv6") else "0.0.0.0"}


@matrix
def test_commands_and_variables_are_the_programs(values: Mapping[str, Any]) -> None:
    """The program accepts every command line that calls it, and reads every variable that it gets."""
    need_launcher("static")
    parsed = []
    for pod in pod_templates(render(values)):
        for container in containers(pod.spec):
            words = [*container.get("command", ()), *container.get("args", ())]
            if "llamaclust" in words[:3]:
                parsed.append(parse(words[words.index("llamaclust") + 1 :], container))
                given = {each["name"] for each in container["env"]} - _OWN_VARIABLES
                assert {name for name in given if not name.startswith("RAY_")} <= variables(), pod.owner
    kinds = 1 + len(values.get("workers", {}).get("groups", ()))
    model = values.get("model", {})
    copies = 1 + kinds if model.get("volume", {}).get("kind", "perPod") == "perPod" else 1
    if model.get("pullers") == "first":
        copies = 1  # The workers' command is a shell script in which the first worker pulls.
    pulls = ["pull"] * copies if model.get("pull", True) else []
    workers = ["worker"] * kinds if launcher_of(values) == "static" else []
    assert sorted(parsed) == sorted(["up", "generate", *workers, *pulls])


def parse(words: list[str], container: Manifest) -> str:
    """Returns the command's name. Raises an error if the program refuses the command."""
    samples = {
        "POD_NAME": f"{NAME}-worker-0",
        "POD_IP": "fd00::7" if "[$(POD_IP)]" in str(words) else "10.0.0.7",
        "CORES": "2",
    }
    there = {each["name"] for each in container["env"]}
    words = [
        re.sub(r"\$\((\w+)\)", lambda found: samples[found[1]] if found[1] in there else "", word) for word in words
    ]
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    with command.make_context(command.name, words) as context:
        if command.name == "worker":
            check_worker(command, context.params)
        return str(command.name)


def check_worker(command: Any, options: Mapping[str, Any]) -> None:
    """Checks a worker's options further than the parser does."""
    with patch("llamaclust.cli.worker._run") as run:
        command.callback(**options)
    (settings,) = run.call_args.args
    assert [settings.join, *settings.standbys] == options["join"] and settings.name.endswith("-worker-0")


def variables() -> set[str]:
    """Returns the variables that the program reads."""
    source = inspect.getsource(environment_module)
    return set(re.findall(r"LLAMACLUST_[A-Z_]+", source))


def test_a_wrong_option_would_be_noticed() -> None:
    need_launcher("static")
    with pytest.raises(Exception, match="No such option"):
        parse(["worker", "--join=a:1", "--tokenfile=x"], {"env": []})
    with pytest.raises(UsageError, match="--listen"):
        parse(["worker", "--join=a:1", "--token-file=x", "--listen=$(POD_IP):7102"], {"env": []})


# -- a cluster of it ---------------------------------------------------------------------------------------------------


def eventually(check: Callable[[], bool], pods: list[LocalPod], what: str) -> None:
    end = time.monotonic() + _START_S
    while not check():
        ended = [pod for pod in pods if pod.process is not None and pod.process.poll() is not None]
        logs = "".join(f"\n--- {pod.name}\n{pod.log.read_text()}" for pod in pods if pod.log.exists())
        assert not ended and time.monotonic() < end, f"{what}: {logs}"
        time.sleep(0.1)


@pytest.fixture
def manifests(tmp_path: Path) -> tuple[Manifest, ...]:
    need_launcher("static")
    api, join, grpc = free_port(), free_port(1), free_port()  # Workers with certificates join at the port after `join`.
    small = {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}
    values = {
        "coordinator": {"ports": {"api": api, "join": join}, "startupSeconds": 60},
        "workers": {"port": grpc, "packedCacheSize": "0", "resources": small},
        "service": {"port": api},
        "config": {"context_length": 512, "max_sequences": 2},
    }
    return with_secrets(render(values), tmp_path / "secrets")


def with_secrets(rendered: tuple[Manifest, ...], folder: Path) -> tuple[Manifest, ...]:
    with fake_api() as kubernetes:
        kubernetes.make_secrets(rendered, folder)
        return (*rendered, *kubernetes.secrets.values())


@pytest.fixture
def pods(manifests: tuple[Manifest, ...], tmp_path: Path, demo_model: Path) -> Iterator[list[LocalPod]]:
    """Starts the workers' pods before the coordinator's, with the model where `model pull` puts it."""
    services = {f"{NAME}-coordinator": "127.0.0.1", NAME: "127.0.0.1"}
    coordinator = one(manifests, "Deployment")["spec"]["template"]["spec"]
    workers = one(manifests, "StatefulSet")["spec"]
    specs = [
        (f"{NAME}-worker-{index}", f"127.0.0.{11 + index}", workers["template"]["spec"])
        for index in range(workers["replicas"])
    ]
    specs.append((f"{NAME}-coordinator-0", "127.0.0.1", coordinator))
    with ExitStack() as stack:
        found = []
        for name, address, spec in specs:
            pod = LocalPod(name, address, spec, manifests, tmp_path / name, services)
            (pod.volume("data") / "models").symlink_to(demo_model.parent.parent)
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
        assert all(pod.probe(kind) for kind in ("startupProbe", "livenessProbe")), pod.name
    eventually(
        lambda: all(pod.probe("readinessProbe") for pod in pods), pods, "layers are loaded, the other one is idle"
    )
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


def test_pods_wait_for_a_shared_model(tmp_path: Path, demo_model: Path) -> None:
    """The init container ends when the file exists. It downloads nothing."""
    rendered = render({"model": {"volume": {"kind": "shared"}, "pullSeconds": 20}})
    manifests = with_secrets(rendered, tmp_path / "secrets")
    spec = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    pod = LocalPod("waiting", "127.0.0.1", spec, manifests, tmp_path / "pod", {})
    (wait,) = (container for container in spec["initContainers"] if container["name"] == "model")
    late = threading.Timer(2.0, (pod.volume("data") / "models").symlink_to, (demo_model.parent.parent,))
    begin = time.monotonic()
    late.start()
    pod.run(wait)
    late.join()
    assert time.monotonic() - begin > 2.0
