"""Runs `llamaclust` commands as a user does, with a state directory of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from support.clusters.forked_commands import run_forked
from support.clusters.forking.forks import ForkedCommand, fork_server

COMMAND = (sys.executable, "-P", "-m", "llamaclust")
_START_S = 120.0
_END_S = 60.0  # an idle machine needs two seconds
_POLL_S = 0.01
_MOST_SHOWN = 6000


def eventually(happens: Callable[[], bool], within_s: float, what: str) -> None:
    """Waits until `happens()` is true; fails the test after `within_s`. A slow `happens` is called less often, since it
    may start processes."""
    begin = time.monotonic()
    end = begin + within_s
    while not happens():
        now = time.monotonic()
        assert now < end, f"not within {within_s:g} s: {what}"
        time.sleep(min(max(_POLL_S, 5 * (now - begin)), 0.5))
        begin = time.monotonic()


def is_there(process: psutil.Process) -> bool:
    """Tells whether a process runs; a zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line of standard error, an error message."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, self.err
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert self.out == ""
        return lines[0]

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class Running:
    """A running command, the leader of its own process group as in a terminal."""

    process: subprocess.Popen[bytes] | ForkedCommand
    out: Path
    err: Path

    def press_ctrl_c(self) -> None:
        """Interrupts every process of the group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def says(self, text: str, within_s: float = _START_S) -> None:
        """Waits until standard error contains the text; fails if the command ends first."""

        def said() -> bool:
            ended = self.process.poll() is not None
            if text in self.err.read_text():
                return True
            assert not ended, f"ended with {self.process.returncode}: {self.err.read_text()}"
            return False

        eventually(said, within_s, f"{text!r} on standard error")

    def workers(self, count: int) -> dict[str, psutil.Process]:
        """Waits for `count` worker processes and returns them by name."""
        found: dict[str, psutil.Process] = {}

        def there() -> bool:
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):  # A process that has just ended.
                    words = child.cmdline()
                    if "llamaclust.worker" in words:
                        found[words[words.index("--name") + 1]] = child
            return len(found) == count

        eventually(there, _START_S, f"{count} workers")
        return found

    def wait(self, within_s: float = 60.0) -> Done:
        code = self.process.wait(within_s)
        return Done(code, self.out.read_text() if self.out.is_file() else "", self.err.read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Cluster:
    """A ready cluster, which tests use through its API and its processes."""

    command: Running
    name: str
    api: str
    pid: int

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.api, timeout=30.0, trust_env=False, verify=False)

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.http.get("/cluster").json()["status"]
        return status

    @property
    def worker_pids(self) -> dict[str, int]:
        return {worker["name"]: worker["pid"] for worker in self.status["workers"]}

    @property
    def processes(self) -> list[psutil.Process]:
        """All processes that the cluster's process has started."""
        return psutil.Process(self.pid).children(recursive=True)

    def metric(self, line_start: str) -> float:
        """Sums the lines of /metrics that begin with `line_start`."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(line_start))

    def answer(self, **fields: Any) -> tuple[list[int], list[float]]:
        """Returns the token ids of a completion and the float32 values of their logprobs."""
        body = {"prompt": "the first word", "max_tokens": 12, "temperature": 0, "logprobs": 0, "return_token_ids": True}
        reply = self.http.post("/v1/completions", json=body | fields)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        return choice["token_ids"], float32(choice["logprobs"]["token_logprobs"])


def float32(written: list[float]) -> list[float]:
    """Returns the float32 values of numbers that were written with nine digits or more."""
    return [float(np.float32(value)) for value in written]


@dataclass(frozen=True)
class CommandLine:
    """Runs commands in `folder`, which also has the cluster files and models of the test."""

    folder: Path
    _started: list[Running] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    _variables: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def logging(self, form: str) -> Iterator[None]:
        """Sets the log form of commands that start within the context."""
        self._variables["LLAMACLUST_LOG"] = form
        try:
            yield
        finally:
            self._variables.clear()

    def set_variables(self, **variables: str) -> None:
        """Sets environment variables of commands that start later."""
        self._variables.update(variables)

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def cluster_dir(self, name: str) -> Path:
        return self.state_dir / name

    @property
    def _environment(self) -> dict[str, str]:
        own = {"LLAMACLUST_STATE_DIR": str(self.state_dir), "LLAMACLUST_HOME": str(self.folder / "home")}
        others = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLUST_")}
        return others | own | self._variables

    def start(
        self,
        *arguments: str | bytes | Path,
        out: Path | None = None,
        before: Sequence[str] = (),
        program: Sequence[str | Path] | None = None,
        network: str | None = None,
    ) -> Running:
        """Starts a command in its own session without input. `out`: file of its standard output; `before`: words before
        the command, such as `nohup`, whose process executes it; `network`: a network namespace."""
        number = len(self._started)
        out, err = out or self.folder / f"{number}.out", self.folder / f"{number}.err"
        with out.open("wb") as to_out, err.open("wb") as to_err, Path(os.devnull).open("rb") as nothing:
            outputs = nothing.fileno(), to_out.fileno(), to_err.fileno()
            process: subprocess.Popen[bytes] | ForkedCommand
            server = None if before or program else fork_server("llamaclust")
            if server is not None and server.serves(self._environment):
                words = [os.fsdecode(word) for word in arguments]
                pid = server.fork(words, self._environment, self.folder, outputs, network)
                process = ForkedCommand(words, pid)
            else:
                place = () if network is None else ("ip", "netns", "exec", network)
                process = subprocess.Popen(
                    [*place, *before, *(program or COMMAND), *arguments],
                    stdin=nothing,
                    stdout=to_out,
                    stderr=to_err,
                    cwd=self.folder,
                    env=self._environment,
                    start_new_session=True,
                )
        self._started.append(Running(process, out, err))
        return self._started[-1]

    def run(self, *arguments: str | bytes | Path, within_s: float = 60.0) -> Done:
        """Runs a command to its end in a forked process, which saves the time of imports. Variables such as PYTHONPATH
        have the values of the first command."""
        number = f"run-{next(self._numbers)}"
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        words = ["llamaclust", *map(os.fsdecode, arguments)]
        code = run_forked(words, self._environment, self.folder, out, err, within_s)
        return Done(code, out.read_text(), err.read_text())

    def cluster_file(self, model: Path | str, name: str = "tiny", **keys: Any) -> Path:
        """Writes the file of a cluster at any free port, with two workers whose speeds are given and not measured."""
        speed = {"threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}
        workers = [{"name": "a", **speed}, {"name": "b", **speed}]
        values = {"name": name, "model": str(model), "listen": "127.0.0.1:0", "workers": workers, **keys}
        if "models" in keys:
            del values["model"]
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return path

    @contextmanager
    def cluster(self, model: Path | str, name: str = "tiny", **keys: Any) -> Iterator[Cluster]:
        """Runs `up` in the foreground and yields the cluster when it is ready; kills the command at the end."""
        running = self.start("up", self.cluster_file(model, name, **keys))
        try:
            running.says(f"{name} is ready")
            record = json.loads((self.cluster_dir(name) / "cluster.json").read_text())
            cluster = Cluster(running, name, record["api"], record["pid"])
            with cluster.http:
                yield cluster
        finally:
            running.kill()

    def left_running(self) -> dict[int, str]:
        """Returns descriptions, by process id, of running processes that commands of this folder have started."""
        found = {process.pid: _description(process) for process in psutil.process_iter()}
        return {pid: what for pid, what in found.items() if str(self.folder) in what}

    def end_commands(self) -> None:
        """Kills the commands that run in the foreground."""
        for running in self._started:
            running.kill()

    def close(self) -> None:
        """Kills the foreground commands, prints the end of their standard errors, and fails if processes remain."""
        self.end_commands()
        for running in self._started:
            print(f"{running.err.name}: {running.err.read_text(errors='replace')[-_MOST_SHOWN:]}")
        try:
            eventually(lambda: not self.left_running(), _END_S, "the end of every process")
        finally:
            left = self.left_running()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            assert not left


def _description(process: psutil.Process) -> str:
    """Returns the command line and state directory; empty for a process that has ended or is another user's."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return " ".join([*process.cmdline(), process.environ().get("LLAMACLUST_STATE_DIR", "")])
    except psutil.Error:
        return ""


@contextmanager
def command_line() -> Iterator[CommandLine]:
    """Yields a command line in a folder with a short path, since socket paths are limited; removes all at the end."""
    with tempfile.TemporaryDirectory(prefix="llamaclust-test-") as folder:
        line = CommandLine(Path(folder))
        try:
            yield line
        finally:
            line.close()


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stops a process within the context, so that its work does not end before the test observes it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # The cluster may have replaced it.
            os.kill(pid, signal.SIGCONT)
