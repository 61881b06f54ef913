"""llama.cpp's own server tests, unchanged, against llamaclust: how many of each file pass.

Usage: `python benchmarks/suites/llamacpp.py MODEL.gguf [-k EXPRESSION] [FILE ...]`

The tests come out of llama-cpp-python's source package, which pip downloads (77 MB), or from `--source`, a checkout of
llama.cpp. They run with the server of `llama_server.py`, which uses MODEL in place of the one that the tests name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from results import count, print_table

PACKAGE = "llama-cpp-python==0.3.36"
TESTS = Path("tools/server/tests")
TEMPLATES = Path("models/templates")
NO_MODEL_OF_THEIR_OWN = """
basic chat_completion compat_anthropic compat_oai_responses completion ctx_shift ignore_eos infill kv_keep_only_active
metrics security sleep slot_save stream template tokenize tool_call
"""
HERE = Path(__file__).parent


def fetch(folder: Path) -> Path:
    """llama.cpp's source, out of the package. Ends the program where it cannot be had."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    loaded = subprocess.run([*command, "-d", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    archives = [*folder.glob("*.tar.gz")]
    if not archives:
        raise SystemExit(f"skipped: {PACKAGE} cannot be downloaded: {loaded.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        wanted = [
            member for member in archive if any(f"llama.cpp/{part}/" in member.name for part in (TESTS, TEMPLATES))
        ]
        archive.extractall(folder, wanted, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def prepare(source: Path, folder: Path) -> Path:
    """A copy of the tests in its place beside the templates, and the server that they start."""
    for part in (TESTS, TEMPLATES):
        shutil.copytree(source / part, folder / part)
    server = folder / "llama-server"
    server.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE.resolve() / "llama_server.py"} "$@"\n')
    server.chmod(0o755)
    return folder / TESTS


def run(tests: Path, folder: Path, model: Path, server: Path | None, arguments: list[str]) -> Path:
    """Runs them; the JUnit file of their results."""
    report = folder / "results.xml"
    environment = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(folder / "llama-server"),
        "LLAMACLUST_SUITE_MODEL": str(model.resolve()),
        "LLAMACLUST_SUITE_FOLDER": str(folder),
        "PORT": str(_free_port()),
        "PYTHONPATH": os.pathsep.join([str(HERE.resolve()), os.environ.get("PYTHONPATH", "")]),
    }
    if server is not None:
        environment |= {"LLAMACLUST_SUITE_SERVER": str(server.resolve()), "OMP_WAIT_POLICY": "passive"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "llamacpp_plugin",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
    ]
    command += ["--tb=line", f"--junitxml={report}", *arguments]
    subprocess.run(command, cwd=tests, env=environment, check=False)
    if not report.exists():
        raise SystemExit("skipped: the tests did not run; they need: pip install openai requests filelock")
    return report


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "files", nargs="*", default=NO_MODEL_OF_THEIR_OWN.split(), help="names of test files, such as basic"
    )
    parser.add_argument("--source", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--server", type=Path, help="a llama-server to test in place of a cluster, with the same model")
    parser.add_argument("-k", default="", help="as pytest's -k")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="llamacpp-tests-") as name:
        folder = Path(name)
        source = options.source or fetch(folder)
        tests = prepare(source, folder)
        files = [f"unit/test_{name}.py" for name in options.files]
        arguments = [*files, *(["-k", options.k] if options.k else [])]
        print_table(count(run(tests, folder, options.model, options.server, arguments)))


if __name__ == "__main__":
    main()
