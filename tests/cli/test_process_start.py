"""Tests of the command's start: closed standard streams, and signals to the first process of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.clusters.command_line import CommandLine

LLAMACLUST = (sys.executable, "-m", "llamaclust")
NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
SLOW_IMPORT = """
import sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "llamaclust.cli.app":
            print("importing", flush=True)
            while True:
                time.sleep(0.01)

sys.meta_path.insert(0, Finder())
from llamaclust.cli.main import main
main()
"""


@pytest.mark.parametrize("closed", ["0", "1", "012"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("generate --model good.gguf -n 2 hello", 0),
        ("model tokenize good.gguf", 0),
        ("model info good.gguf", 0),
        ("why", 2),
        ("worker --join 127.0.0.1:1 --device cuda", 2),
    ],
)
def test_closed_standard_streams(line: CommandLine, words: str, code: int, closed: str) -> None:
    streams = " ".join(f"{number}{'<' if number == '0' else '>'}&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *LLAMACLUST, *words.split()],
        cwd=line.folder,
        env=os.environ | {"LLAMACLUST_STATE_DIR": str(line.folder / "state")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_files_do_not_get_the_descriptors_of_closed_streams(tmp_path: Path) -> None:
    code = """
from llamaclust.core.process_settings import open_standard_streams
open_standard_streams()
import os, sys
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    print("to standard output")
    print("to standard error", file=sys.stderr)
    assert sys.stdin.read() == "" and all(map(os.get_inheritable, range(3)))
"""
    file = tmp_path / "file"
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(file)], check=False)
    assert (done.returncode, file.read_text()) == (0, "")


@pytest.mark.parametrize(("encoding", "shown"), [("iso-8859-1", b"\xfc\\u2192"), ("utf-8", "ü→".encode())])
def test_characters_that_a_locale_lacks_are_shown_as_escapes(encoding: str, shown: bytes) -> None:
    code = """
from llamaclust.core.process_settings import escape_what_locales_lack
escape_what_locales_lack()
print("ü→", end="")
"""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda one: one.name)
def test_a_container_ends_during_its_imports(number: signal.Signals) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no namespaces of processes")
    command = [*NAMESPACE, sys.executable, "-c", SLOW_IMPORT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "importing\n"
            first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            os.kill(first, number)
            assert process.wait(60) == 128 + number
        finally:
            process.kill()


@pytest.mark.parametrize(
    "module",
    ["llamaclust.cli.main", "llamaclust.cli.terminal", "llamaclust.core.process_settings", "llamaclust.cli.app"],
)
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(module: str) -> None:
    program = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["llamaclust", "--version"]
from llamaclust.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT and ended.stdout == ended.stderr == ""
