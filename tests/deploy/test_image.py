"""Tests of the container image without building it. `make image-test` builds the image and sends it a request."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llamaclust.cluster.front.http.certificate import ServerCertificate
from llamaclust.cluster.state.directory import ClusterDir
from support.network.loopback import free_port, has_ipv6_loopback
from support.paths import ROOT
from support.wire.api_certificates import write_signed

DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()


def is_sent(path: str) -> bool:
    """Returns True if .dockerignore lets a file reach the builder. The last matching line decides."""
    sent = True
    above = [path, *(str(parent) for parent in Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        pattern = pattern.removeprefix("**/")
        if (
            pattern
            and pattern[0] != "#"
            and any(fnmatch(Path(one).name if anywhere else one, pattern) for one in above)
        ):
            sent = line.startswith("!")
    return sent


def test_the_builder_gets_what_the_package_is_made_of() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = listed.stdout.splitlines()
    folders = {path.name for path in (ROOT / "src/llamaclust").iterdir() if path.is_symlink()} | {"src", "cmake"}
    assert len(folders) >= 10
    for file in files:
        if file.split("/")[0] in folders:
            assert is_sent(file), file
        if file.split("/")[0] in ("tests", "benchmarks", "docs", ".ci", ".git", "examples"):
            assert not is_sent(file), file
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert copied and all(word == "." or is_sent(word) for word in copied)
    assert not is_sent("kernels/cpu/native/build.so") and not is_sent("cluster/__pycache__/config.pyc")


def test_no_process_is_root_and_pins_are_obeyed() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE) and "HEALTHCHECK" in last
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line or "python install" in line]
    assert len(installs) > 2
    assert all("-c constraints.txt" in line or "--no-deps" in line or "'pip>=" in line for line in installs)


def packages() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "deploy/image_packages.py"))


def test_requirements_are_the_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    requirements = packages()["requirements"]
    assert callable(requirements)
    assert any(one.startswith("numpy") for one in requirements(""))
    assert "pip" in requirements(""), "the default model is in a wheel"
    with pytest.raises(ValueError, match="no extra 'nonsense'"):
        requirements("nonsense")


def test_what_is_left_out_is_no_programs(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    for folder in ("numpy/tests", "numpy/_core/include", "numpy/testing", "llamaclust/tests"):
        (site / folder).mkdir(parents=True)
    useless = packages()["useless"]
    assert callable(useless)
    found = [str(path.relative_to(site)) for path in useless(site)]
    assert found == ["numpy/_core/include", "numpy/tests"]


# -- health ------------------------------------------------------------------------------------------------------------


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving(status: int, certificate: ServerCertificate | None = None) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Health", (_Health,), {"status": status}))
    if certificate is not None:
        server.socket = certificate.context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Yields a state directory in which the cluster `lab` runs."""
    with ClusterDir(tmp_path / "lab").locked():
        yield tmp_path


def record(state: Path, port: int, scheme: str = "http", certificate: Path | None = None, name: str = "lab") -> None:
    (state / name).mkdir(exist_ok=True)
    values = {"api": f"{scheme}://0.0.0.0:{port}", "api_certificate": certificate and str(certificate)}
    (state / name / "cluster.json").write_text(json.dumps(values))


def health(state: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-I", str(ROOT / "deploy/healthcheck.py")]
    nowhere = f"http://127.0.0.1:{free_port()}"
    variables = {"PATH": os.environ["PATH"], "LLAMACLUST_STATE_DIR": str(state), "http_proxy": nowhere}
    variables["https_proxy"] = nowhere
    return subprocess.run(script, env=variables, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_coordinator_is_healthy_while_it_takes_requests(status: int, code: int, state: Path) -> None:
    """The folder also has the record of a cluster that was killed."""
    record(state, free_port(), name="killed")
    (state / "killed/lock").touch()
    with serving(status) as port:
        record(state, port)
        done = health(state)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize("is_its_own", [True, False])
def test_a_coordinator_with_tls_is_healthy_if_it_shows_its_certificate(
    is_its_own: bool, state: Path, tmp_path: Path
) -> None:
    """An authority issued the certificate, for a name other than the address that is checked."""
    certificate = ServerCertificate(write_signed(tmp_path, ("llm.example",)).files)
    certificate.publish(tmp_path / "api.crt")
    if not is_its_own:
        certificate = ServerCertificate(write_signed(tmp_path).files)
    with serving(200, certificate) as port:
        record(state, port, "https", tmp_path / "api.crt")
        done = health(state)
    assert done.returncode == (0 if is_its_own else 1), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_cluster_that_was_killed_is_not_healthy(tmp_path: Path) -> None:
    with serving(200) as port:
        record(tmp_path, port)
        (tmp_path / "lab/lock").touch()
        done = health(tmp_path)
    assert done.returncode == 1 and "no cluster is ready" in done.stdout and done.stderr == ""


def test_a_damaged_record_is_told_in_a_line(state: Path) -> None:
    record(state, 1)
    (state / "lab/cluster.json").write_text("{")
    done = health(state)
    assert done.returncode == 1 and done.stdout.startswith("JSONDecodeError: ") and done.stderr == ""


@pytest.mark.parametrize("init", [[], ["sh", "-c", '"$@"; exit', "init"]], ids=["alone", "below an init process"])
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")])
def test_a_worker_is_healthy_while_its_process_listens(
    family: socket.AddressFamily, host: str, init: list[str]
) -> None:
    check = runpy.run_path(str(ROOT / "deploy/healthcheck.py"))["check_worker"]
    listener = """
import socket, sys
with socket.socket(socket.AddressFamily(int(sys.argv[1]))) as one:
    one.bind((sys.argv[2], 0))
    if sys.argv[3] == "listen":
        one.listen()
    print(one.getsockname()[1], flush=True)
    sys.stdin.read()
"""
    if family is socket.AF_INET6 and not has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    for does in ("listen", "not"):
        command = [*init, sys.executable, "-c", listener, str(int(family)), host, does]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            if does == "listen":
                assert check(process.pid) == f"listens on {host} port {port}"
            else:
                with pytest.raises(OSError, match="listens at no address yet"):
                    check(process.pid)
            process.communicate()


# -- builders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "used"), [(["docker", "podman"], "docker"), (["podman", "buildah"], "podman"), (["buildah"], "buildah")]
)
def test_the_first_builder_that_works_builds(there: list[str], used: str, tmp_path: Path) -> None:
    """The builders are scripts that only write their arguments to a file."""
    for name in ("docker", "podman", "buildah"):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\n[ "$1" = info ] && exit {int(name not in there)}\necho {name} "$@" >> {tmp_path}/told\n'
        )
        script.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    make = ["make", "-s", "image", "IMAGE=a:1", "BASE=b:2", "EXTRAS=c", "IMAGE_FLAGS=--quiet"]
    subprocess.run(make, cwd=ROOT, env=variables, check=True, timeout=20)
    (told,) = (tmp_path / "told").read_text().splitlines()
    form = "" if used == "docker" else "--format docker "
    rest = "--build-arg BASE=b:2 --build-arg EXTRAS=c --quiet -t a:1 -f deploy/Dockerfile ."
    assert told == f"{used} build {form}{rest}"


def test_without_a_builder_one_line_says_so(tmp_path: Path) -> None:
    for name in ("docker", "podman", "buildah"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "-s", "image"], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode != 0 and done.stderr.startswith("error: no docker, podman or buildah")
