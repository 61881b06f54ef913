"""Runs llama.cpp's own server tests, unchanged, against llamaclust, and counts how many tests of each file pass.

    python benchmarks/suites/llamacpp.py MODEL.gguf [FILE ...] [--results FOLDER] [-k EXPRESSION] [--server PATH]

The tests come from llama-cpp-python's source package, which pip downloads (77 MB), or from `--source`, a checkout of
llama.cpp. The server is `llama_server.py`, or the llama-server that `--server` names. MODEL or a small substitute
replaces the models that the tests name. Files with results in `--results` are not run again. Tables of both servers are
printed next to each other."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llamacpp_models import build_stand_ins
from results import count, outcomes, print_comparison, print_table

PACKAGE = "llama-cpp-python==0.3.36"
TESTS = Path("tools/server/tests")
TEMPLATES = Path("models/templates")
FILES = """
basic chat_completion compat_anthropic compat_gcp compat_oai_responses completion ctx_shift embedding ignore_eos infill
kv_keep_only_active lora metrics proxy rerank router security sleep slot_save speculative stream template tokenize
tool_call vision_api
"""
"""Names of the test files, except those for tools that the server itself runs."""
CLUSTER, LLAMA_SERVER = "llamaclust", "llama-server"
HERE = Path(__file__).parent
_FILE_S = 3600


def fetch(folder: Path) -> Path:
    """Downloads the package and returns llama.cpp's source in it. Ends the program if the download fails."""
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
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later have it.
        archive.extractall(folder, wanted)
    return next(folder.glob("*/vendor/llama.cpp"))


def prepare(source: Path, folder: Path) -> Path:
    for part in (TESTS, TEMPLATES):
        shutil.copytree(source / part, folder / part)
    (folder / TESTS / "tmp").mkdir(exist_ok=True)  # Folder of slots.
    server = folder / "llama-server"
    server.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE.resolve() / "llama_server.py"} "$@"\n')
    server.chmod(0o755)
    return folder / TESTS


@dataclass(frozen=True, slots=True)
class Run:
    tests: Path
    folder: Path  # Folder for the servers' files.
    model: Path
    server: Path | None  # A llama-server to test instead of a cluster.

    def file(self, name: str, report: Path, expression: str) -> None:
        made = self.folder / report.name
        words = ["-q", "-p", "llamacpp_plugin", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line"]
        words += [f"--junitxml={made}", f"unit/test_{name}.py", *(["-k", expression] if expression else [])]
        command = [sys.executable, "-m", "pytest", *words]
        subprocess.run(command, cwd=self.tests, env=self._environment(), check=False, timeout=_FILE_S)
        if not made.exists():
            raise SystemExit("skipped: the tests did not run; they need: pip install openai requests filelock")
        shutil.move(made, report)

    def _environment(self) -> dict[str, str]:
        own = {
            "LLAMA_SERVER_BIN_PATH": str(self.folder / "llama-server"),
            "LLAMACLUST_SUITE_MODEL": str(self.model.resolve()),
            "LLAMACLUST_SUITE_STAND_INS": str(self.folder / "stand-ins"),
            "LLAMACLUST_SUITE_FOLDER": str(self.folder),
            "PORT": str(_free_port()),
            "PYTHONPATH": os.pathsep.join([str(HERE.resolve()), os.environ.get("PYTHONPATH", "")]),
        }
        if self.server is not None:
            own |= {"LLAMACLUST_SUITE_SERVER": str(self.server.resolve()), "OMP_WAIT_POLICY": "passive"}
        return os.environ | own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run_all(options: argparse.Namespace, folder: Path, results: Path) -> list[Path]:
    reports = [results / f"{name}.xml" for name in options.files]
    missing = [report for report in reports if not report.exists()]
    if not missing:
        return reports
    build_stand_ins(folder / "stand-ins")
    run = Run(prepare(options.source or fetch(folder), folder), folder, options.model, options.server)
    for report in missing:
        run.file(report.stem, report, options.k)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", nargs="*", default=FILES.split(), help="names of test files, such as basic")
    parser.add_argument("--source", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--server", type=Path, help="path of a llama-server to test instead of a cluster")
    parser.add_argument("--results", type=Path, help="folder for results, with a subfolder for each server")
    parser.add_argument("-k", default="", help="run only tests that match this expression, like pytest's -k")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="llamacpp-tests-") as name:
        folder = Path(name)
        kept = options.results or folder / "results"
        results = kept / (CLUSTER if options.server is None else LLAMA_SERVER)
        results.mkdir(parents=True, exist_ok=True)
        for report in run_all(options, folder, results):
            print_table(count(report))
        print_comparison({server: outcomes(kept / server) for server in (CLUSTER, LLAMA_SERVER)})


if __name__ == "__main__":
    main()
