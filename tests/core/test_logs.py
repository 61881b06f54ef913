"""Tests of log lines with fields: each record is one line that programs can parse, and contains no secret."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.membership.log_tail import last_error
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core import logs
from llamaclust.core.logs import (
    RECENT_S,
    FileShortage,
    LogFormat,
    last_lines,
    name_cluster,
    read_line,
    recent_trouble,
    start_logging,
)
from llamaclust.wire.control.messages import CoordinatorMessage, Heartbeat
from llamaclust.wire.security.credentials import Insecure
from support.clusters.command_line import CommandLine, command_line, eventually
from support.models.hostile_models import tiny
from support.seed import SEED
from support.wire.control_messages import REGISTER

HOSTILE = ('a "b" \\ c', "two\nlines", "\x1b[31mred", "level=info msg=x", "{", "", "naïve ☃", "a=b", "\\x", "\ud800")
FIELDS = (LogFormat.LOGFMT, LogFormat.JSON)


@contextmanager
def logging_as(form: LogFormat, **where: str) -> Iterator[logging.Logger]:
    """Sets up logging as in a new process, without pytest's handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        start_logging(form, **where)
        yield logging.getLogger("llamaclust.x")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.mark.parametrize("form", FIELDS)
@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_is_said_is_one_line(form: LogFormat, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_as(form, cluster="tiny", worker="") as log:
        log.warning("%s", text, extra={"request": "abc", "tokens": 3})
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "\x1b" not in shown
    assert read_line(shown[:-1]) == ("WARNING", text)
    assert "worker" not in shown.partition("msg")[0]
    if form is LogFormat.JSON:
        fields = json.loads(shown)
        assert (fields["cluster"], fields["request"], fields["tokens"], fields["msg"]) == ("tiny", "abc", 3, text)
        assert fields["time"].endswith("Z")
    else:
        assert "level=warning cluster=tiny msg=" in shown and shown.endswith("request=abc tokens=3\n")


@pytest.mark.parametrize("form", FIELDS)
def test_a_worker_that_joins_names_its_cluster_from_then_on(
    form: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_as(form, cluster="", worker="a") as log:
        log.warning("before")
        assert recent_trouble() == "before"
        name_cluster("home")
        assert recent_trouble() == ""
        log.error("after %d", 1)
        log.info("later")
        assert recent_trouble() == "after 1"
    before, after, _ = capsys.readouterr().err.splitlines()
    assert "cluster" not in before and "home" in after and "worker" in after
    assert re.search(r"cluster\W+home\W+worker\W+a\W", after)


@pytest.mark.parametrize("name", ["grpc._server", "py.warnings", "llamaclusters", "absl"])
def test_warnings_of_other_programs_loggers_are_no_last_error(name: str) -> None:
    with logging_as(LogFormat.TEXT) as log:
        log.warning("ours")
        logging.getLogger(name).warning("Tip: In future versions ...")
        assert recent_trouble() == "ours"
        logging.getLogger(name).error("no memory")
        assert recent_trouble() == "no memory"


def test_the_last_lines_are_kept_as_they_were_written(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_as(LogFormat.TEXT) as log:
        written = sum(last_lines()[1:], len(last_lines()[0]))
        for number in range(1500):
            log.info("line %d", number)
        log.error("two\nlines")
        lines, before = last_lines()
    shown = capsys.readouterr().err.splitlines()
    assert len(lines) == 1000 and list(lines) == shown[-1000:] and lines[-1] == "lines"
    assert before + len(lines) == written + 1502


def test_an_error_is_recent_for_a_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now_s[0])
    with logging_as(LogFormat.TEXT) as log:
        log.error("no memory")
        for later_s, words in ((0.0, "no memory"), (RECENT_S, "no memory"), (0.1, ""), (600.0, "")):
            now_s[0] += later_s
            assert recent_trouble() == words


def test_the_last_words_of_a_worker_elsewhere_are_those_of_its_last_sign_of_life() -> None:
    async def say(message: CoordinatorMessage) -> None:
        """Drops the message."""

    handle = WorkerHandle(replace(REGISTER, log="/var/log/a.log", host="far"), say, lambda: "", Insecure())
    assert str(handle.error).endswith("is lost: no reason is known; look at /var/log/a.log on far")
    handle.receive(Heartbeat(0.5, 1, 2, 3, 4, last_error="the disk is full"))
    handle.lose("its connection broke")
    words = "its connection broke; its last error: the disk is full; look at /var/log/a.log on far"
    assert str(handle.error).endswith(words)


@pytest.mark.parametrize("form", LogFormat)
def test_last_words_of_every_format(form: LogFormat, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.log"

    def words() -> str:
        path.write_text(capsys.readouterr().err)
        return last_error(path)

    with logging_as(form, worker="a") as log:
        log.info("all is well")
        assert words() == ""
        log.warning("low on memory")
        log.info("goes on")
        assert words() == "low on memory"
        try:
            raise ValueError("seven")
        except ValueError:
            log.exception("the worker failed")
        assert words() == "ValueError: seven"


@pytest.mark.parametrize(
    "line", ["{" * 50_000, "level=info", 'level=info msg="\\q"', "level=1 msg=", "[1]", '{"level": 1}']
)
def test_lines_that_no_logger_wrote(line: str) -> None:
    assert read_line(line) in (None, ("1", ""))


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        yield line


def test_a_cluster_tells_of_itself_in_fields(line: CommandLine) -> None:
    """Lines name the coordinator, workers and request ids. They contain no key and no prompt."""
    keys = line.folder / "keys"
    keys.write_text("a-secret-key\n")
    keys.chmod(0o600)
    header = {"Authorization": "Bearer a-secret-key"}
    with line.logging("json"), line.cluster("good.gguf", api_keys_file=str(keys)) as cluster:
        body = {"prompt": "a secret prompt", "max_tokens": 3, "ignore_eos": True, "seed": SEED}
        reply = cluster.http.post("/v1/completions", json=body, headers=header).json()
        log = cluster.command.err
        eventually(lambda: "request ended" in log.read_text(), 60.0, "the request's line")
        records = [json.loads(text) for text in log.read_text().splitlines()]
        logs = {name: (line.cluster_dir("tiny") / "logs" / f"{name}.log").read_text() for name in "ab"}
    assert all(record["cluster"] == "tiny" for record in records)
    [ended] = [record for record in records if record["msg"] == "request ended"]
    assert reply["id"] == f"cmpl-{ended['request']}"
    assert (ended["reason"], ended["tokens"]) == ("length", 3) and ended["seconds"] > 0
    for name, text in logs.items():
        for entry in text.splitlines():
            record = json.loads(entry)
            assert (record["cluster"], record["worker"]) == ("tiny", name), entry
        assert "are loaded as epoch" in text
    for text in (log.read_text(), *logs.values()):
        for secret in ("a-secret-key", "secret prompt"):
            assert secret not in text


def test_another_format_is_refused_by_name(line: CommandLine) -> None:
    with line.logging("xml"):
        done = line.run("up", line.cluster_file("good.gguf", "other"))
    assert done.code == 2 and "LLAMACLUST_LOG=xml is not supported; set one of text, logfmt, json" in done.error


SHORTAGE = """
import asyncio, io, resource, socket, sys
from contextlib import nullcontext
from llamaclust.cli.progress import cluster_view
from llamaclust.core import logs

async def main(backlog):
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, backlog=backlog)
    address = server.sockets[0].getsockname()
    callers = [socket.socket() for _ in range(20)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (callers[-1].fileno() + 3,) * 2)
    for caller in callers:
        caller.setblocking(False)
        caller.connect_ex(address)
    while "failures in" not in sys.stderr.getvalue():
        await asyncio.sleep(0.01)
    print(sys.stderr.getvalue(), end="")  # without what the end of a loop in such a shortage tells

sys.stderr = io.StringIO()
with cluster_view("tiny") if sys.argv[2] == "up" else nullcontext(logs.start_logging(logs.LogFormat(sys.argv[3]))):
    asyncio.run(main(int(sys.argv[1])))
"""


@pytest.mark.parametrize("form", ["text", "logfmt", "json"])
@pytest.mark.parametrize("command", ["up", "worker"])
@pytest.mark.parametrize("backlog", [50, 2000])
def test_a_burst_over_the_limit_of_open_files_is_a_line_for_each_few_seconds(
    backlog: int, command: str, form: str
) -> None:
    """A fast machine logs one line. A single connection logs no line."""
    program = [sys.executable, "-c", SHORTAGE, str(backlog), command, form]
    variables = {**os.environ, "LLAMACLUST_LOG": form}
    done = subprocess.run(program, capture_output=True, text=True, timeout=180, check=True, env=variables)
    line = r".*Too many open files: \d+ failures in 5 s; close connections, .*\n"
    assert re.fullmatch(f"(?:{line}){{1,6}}", done.stdout), done.stdout


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_shortages_are_counted_and_other_errors_stay(number: int, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test.shortage")
    shortage = FileShortage(logging.getLogger("test.counts"), wait_s=5.0)
    log.addFilter(shortage)
    for code in (number, number, errno.ECONNRESET, number):
        try:
            raise OSError(code, os.strerror(code))
        except OSError:
            log.exception("failed")
    eventually(lambda: len(caplog.records) == 2, 60.0, "the line of the shortages")
    assert caplog.records[0].exc_info is not None and "3 failures" in caplog.records[1].getMessage()
