"""Runs the commands of the README and the manual, page by page, unless a comment gives a reason not to.

`<!-- not run: REASON -->` before a block omits it. `<!-- run: COMMAND -->` adds a step that a reader has done before.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.clusters.command_line import CommandLine
from support.network.loopback import free_port
from support.paths import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_STEP = re.compile(r"(?:<!-- (not run|run): ([^>]+) -->\n+)?(?:^```sh\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
_SHIM = """#!/bin/sh
case "$1" in
  up) shift; exec {python} -P -m llamaclust up "$@" --detach --set listen=127.0.0.1:{port} ;;
  *) exec {python} -P -m llamaclust "$@" ;;
esac
"""
_CURL = '#!/bin/sh\nexec "{curl}" --silent --show-error --fail-with-body --max-time 120 "$@"\n'


def steps(page: Path) -> Iterator[str]:
    """Yields the commands that are run from a page, in order."""
    for kind, words, block in _STEP.findall(page.read_text()):
        if kind == "run":
            yield words
        if block and kind != "not run":
            yield block


RUN = [page for page in PAGES if any(steps(page))]


def test_what_is_not_run_has_a_reason() -> None:
    reasons = [reason for page in PAGES for reason in re.findall(r"<!-- not run: (.+) -->", page.read_text())]
    assert len(RUN) >= 7 and all(len(reason) >= 10 for reason in reasons)
    named = {path for reason in reasons for path in re.findall(r"\b(?:tests|docs)/[\w/.-]+", reason)}
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_manual_names_no_tests() -> None:
    """Tests may be named only in internal documentation, and in comments about tests that run a block's commands."""
    manual = {page: re.sub(r"<!--.*?-->", "", page.read_text()) for page in PAGES if page.name != "roadmap.md"}
    assert {page.name: found for page, text in manual.items() if (found := re.findall(r"\btest_\w+", text))} == {}


@pytest.mark.promise
@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_commands_of_a_page_run_as_they_stand(page: Path, line: CommandLine, demo_model: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is missing")
    tools, port = line.folder / "bin", free_port()
    tools.mkdir()
    shims = {"llamaclust": _SHIM.format(python=sys.executable, port=port), "curl": _CURL.format(curl=curl)}
    for name, text in shims.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("examples", "tests"):
        (line.folder / name).symlink_to(ROOT / name)
    script = "set -e -o pipefail\n" + "\n".join(steps(page)).replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    variables = {
        **{
            name: value for name, value in os.environ.items() if name == "LLAMACLUST_HOME" or name[:11] != "LLAMACLUST_"
        },
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LLAMACLUST_STATE_DIR": str(line.state_dir),
    }
    try:
        done = subprocess.run(
            ["bash", "-x", "-c", script],
            cwd=line.folder,
            env=variables,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=480.0,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    finally:
        subprocess.run(
            [tools / "llamaclust", "down", "--all"], cwd=line.folder, env=variables, timeout=60.0, check=False
        )
