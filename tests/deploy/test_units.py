"""Tests of the systemd units: their commands are valid, and the documentation installs the files that they use."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from llamaclust.cli.app import app
from llamaclust.cluster.config import environment
from support.paths import ROOT

PROGRAM = "/opt/llamaclust/bin/llamaclust"
DOCS = (ROOT / "docs/several-machines.md").read_text()
units = pytest.mark.parametrize(
    ("name", "command"), [("llamaclust.service", "up"), ("llamaclust-worker.service", "worker")]
)


def setting(unit: str, key: str) -> str:
    (found,) = re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)
    return str(found)


@units
def test_the_program_takes_its_command(name: str, command: str) -> None:
    unit = (ROOT / "deploy" / name).read_text()
    program, *words = shlex.split(setting(unit, "ExecStart"))
    assert (program, words[0]) == (PROGRAM, command)
    group: Any = get_command(app)
    with group.commands[command].make_context(command, words[1:]) as context:
        assert context.command.name == command
    variables = dict(word.split("=") for word in setting(unit, "Environment").split())
    assert variables.keys() <= set(re.findall(r"LLAMACLUST_[A-Z_]+", inspect.getsource(environment)))
    folders = {"/var/lib/" + setting(unit, "StateDirectory"), "/var/cache/" + setting(unit, "CacheDirectory")}
    assert set(variables.values()) == folders


def test_workers_outlive_the_signal_to_their_coordinator() -> None:
    """The default of KillMode would send SIGTERM also to the workers."""
    assert setting((ROOT / "deploy/llamaclust.service").read_text(), "KillMode") == "mixed"


@units
def test_the_program_may_list_addresses(name: str, command: str) -> None:
    unit = (ROOT / "deploy" / name).read_text()
    assert {*setting(unit, "RestrictAddressFamilies").split()} == {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}


@units
def test_the_docs_install_what_it_names(name: str, command: str) -> None:
    unit = (ROOT / "deploy" / name).read_text()
    files = [word for word in shlex.split(setting(unit, "ExecStart")) if word.startswith("/etc/llamaclust/")]
    assert files
    for installed in (*files, f"install -m 644 deploy/{name} /etc/systemd/system/", "venv /opt/llamaclust\n"):
        assert installed in DOCS
    assert f"useradd --system {setting(unit, 'User')}\n" in DOCS


def test_a_standby_waits_until_the_shared_folder_is_mounted() -> None:
    (drop_in,) = re.findall(r"```ini\n(.*?--standby\n.*?)```", DOCS, re.DOTALL)
    folder = f"={setting(drop_in, ' *ReadWritePaths')}\n"
    assert f"[Unit]\n  RequiresMountsFor{folder}" in drop_in and f"LLAMACLUST_STATE_DIR{folder}" in drop_in


@units
def test_systemd_takes_it(name: str, command: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    copy = tmp_path / name
    copy.write_text((ROOT / "deploy" / name).read_text().replace(PROGRAM, sys.executable))
    done = subprocess.run(
        [analyze, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert not complaints
