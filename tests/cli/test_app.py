"""Tests of the whole command: version, help, and Ctrl-C during a native call."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llamaclust import __version__
from llamaclust.cli.app import app
from llamaclust.cli.main import main
from llamaclust.core.errors import UsageError
from support.clusters.command_line import command_line
from support.models.tiny_model import build_tiny_model

SLOW_PROBE = """
import ctypes, sys
from llamaclust.kernels import probes

def slow(threads):
    print("measuring", file=sys.stderr, flush=True)
    return ctypes.CDLL(None).sleep(60)

probes.ReadProbe = slow
from llamaclust.cli.main import main
main()
"""


def commands() -> Iterator[tuple[str, ...]]:
    yield ()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        yield (name,)
        yield from ((name, word) for word in getattr(command, "commands", ()))


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"llamaclust {__version__}\n")


@pytest.mark.parametrize(("typed", "offered"), [("do", "down"), ("status --wa", "--watch"), ("model li", "list")])
def test_shells_complete_commands_and_options(typed: str, offered: str) -> None:
    completing = {"_LLAMACLUST_COMPLETE": "complete_bash", "COMP_WORDS": f"llamaclust {typed}"}
    completing["COMP_CWORD"] = str(len(typed.split()))
    command = [sys.executable, "-m", "llamaclust"]
    done = subprocess.run(command, env=os.environ | completing, capture_output=True, text=True, check=False)
    assert offered in done.stdout.split()


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_names_no_types(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "--help" in result.stdout
    assert re.findall(r"<[a-z]+.*?>|\[\[", result.stdout) == []


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_without_arguments_a_command_prints_its_work_its_help_or_one_line_of_error(words: tuple[str, ...]) -> None:
    """Blocks the program's folder with a file, so that `up` cannot download the demo model."""
    with command_line() as line:
        (line.folder / "home").touch()
        done = line.run(*words)
    if done.code != 0 and "Usage:" not in done.out:
        *said, last = done.err.splitlines()
        assert last.startswith("error: ") and not any(line.startswith("error: ") for line in said)
    else:
        assert done.out
    assert "Traceback" not in done.out + done.err


def test_commands_are_there_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys, llamaclust.cli.app as _; print(*{name.split('.')[1] for name in sys.modules if 'clust.' in name})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(found.split()) == {"cli", "core"}


@pytest.mark.parametrize("command", [("bench",), ("model", "perplexity", "-f", "none.txt")])
def test_kv_types_that_there_are_not(command: tuple[str, ...], tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "m.gguf", layers=1)
    result = CliRunner().invoke(app, [*command, str(model), "--kv-type", "q9"])
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == "--kv-type q9: give one of f16, q8_0, int8"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bench_ends_at_once_though_a_native_call_goes_on(workers: str, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=2)
    command = [sys.executable, "-c", SLOW_PROBE, "bench", str(model), "-t", "1", "-p", "8", "-n", "2"]
    with subprocess.Popen([*command, "--workers", workers], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "measuring\n"
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == ""
    assert time.monotonic() - asked < 20.0


@pytest.mark.parametrize("words", ["-h", "up -h", "model pull -h", "model -h"])
def test_help_has_a_short_name(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["llamaclust", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "Usage: llamaclust" in capsys.readouterr().out
