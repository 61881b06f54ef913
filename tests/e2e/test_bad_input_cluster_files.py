"""Tests of invalid cluster files and command lines with real processes: one line of error, and exit status 2, or 3 with
the missing MiB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.clusters.command_line import CommandLine, command_line, eventually
from support.models.hostile_models import tiny

WORKER = {"name": "a", "threads": 1}


def by_hand(*ranges: tuple[str, int, int]) -> dict[str, Any]:
    return {"plan": [{"worker": worker, "layers": [start, end]} for worker, start, end in ranges]}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'?"),
    "layers overlap": (by_hand(("a", 0, 3), ("b", 2, 4)), "layers [2, 3) of worker 'b' are assigned twice"),
    "a hole": (by_hand(("a", 0, 1), ("b", 3, 4)), "layers [1, 3) are on no worker"),
    "context too long": ({"context_length": 4096}, "the model was trained for 2048 tokens"),
    "open to everybody": ({"listen": "0.0.0.0:0"}, "set api_keys_file as well"),
    "keys that others may read": ({"api_keys_file": "keys"}, "chmod 600"),
    "keys that are not there": (
        {"api_keys_file": "no-keys"},
        "no-keys: cannot read the API keys: no such file; make one: llamaclust keys add",
    ),
    "a chat template that is not there": ({"chat_template": "no-template"}, "no-template"),
}


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "good.gguf")
        (line.folder / "keys").write_text("a-good-key\n")
        (line.folder / "keys").chmod(0o644)
        yield line


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_cluster_file_is_refused_before_a_worker_starts(line: CommandLine, name: str) -> None:
    keys, says = WRONG[name]
    done = line.run("up", line.cluster_file("good.gguf", **keys))
    assert done.code == 2 and says in done.error
    assert not line.cluster_dir("tiny").joinpath("logs", "a.log").exists()


def test_a_state_directory_that_may_be_there_later_is_no_wrong_usage(line: CommandLine) -> None:
    """Systemd does not start the coordinator again after exit code 2."""
    done = line.run("up", line.cluster_file("good.gguf", state_dir="/dev/null/x"))
    assert done.code == 1 and "/dev/null/x/tiny: cannot be created: Not a directory; set `state_dir:`" in done.error


@pytest.mark.parametrize("name", WRONG)
def test_plan_refuses_the_same(line: CommandLine, name: str) -> None:
    keys, says = WRONG[name]
    done = line.run("plan", line.cluster_file("good.gguf", **keys))
    assert done.code == 2 and says in done.error


@pytest.mark.parametrize(
    ("launcher", "more"), [("static", {"workers": 2}), ("mpi", {}), ("ray", {"ray": {"address": "auto"}}), ("ray", {})]
)
def test_nothing_is_planned_for_machines_that_are_not_known(
    line: CommandLine, launcher: str, more: dict[str, Any]
) -> None:
    done = line.run("plan", line.cluster_file("good.gguf", launcher=launcher, **more))
    assert done.code == 2 and f"launcher {launcher}: its machines' resources are known only after" in done.error


def test_workers_of_a_ray_that_starts_here_are_planned_as_local_ones(line: CommandLine) -> None:
    file = line.cluster_file("good.gguf", launcher="ray", ray={"address": "none"})
    plans = [line.run("plan", path, "--json").json for path in (file, line.cluster_file("good.gguf"))]
    one, other = ([(stage["worker"], stage["start"], stage["end"]) for stage in plan["stages"]] for plan in plans)
    assert one == other


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xff", "not UTF-8"),
        (b"a: " + b"[" * 100_000, "nested deeper"),
    ],
)
def test_what_is_no_cluster_file_is_refused_with_its_line(line: CommandLine, content: bytes, says: str) -> None:
    path = line.folder / "no.yaml"
    path.write_bytes(content)
    done = line.run("plan", path)
    assert done.code == 2 and says in done.error and "no.yaml" in done.error


@pytest.mark.parametrize("command", ["plan", "up", "up --detach"])
def test_too_little_memory_is_exit_3_and_the_missing_mib(line: CommandLine, command: str) -> None:
    """`up` gets the workers' memory only after they have started. They end with it."""
    workers = [
        {"name": name, "threads": 1, "memory": "2MiB", "memory_bandwidth_gb_s": 1, "int8_gmac_s": 1}
        for name in ("a", "b")
    ]
    done = line.run(*command.split(), line.cluster_file("good.gguf", workers=workers))
    assert done.code == 3
    assert "MiB are missing" in done.error and "does not fit" in done.error
    eventually(lambda: not line.left_running(), 60.0, "the end of every process")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "--port", "65536"), "--port"),
        (("up", "--set", "workers"), "must be KEY=VALUE"),
        (("status", "--cluster", "../.."), "no cluster is running"),
        (("logs", "../../keys", "--cluster", "tiny"), "no log"),
        (("generate", "hello"), "no cluster is running"),
        (("generate", "hello", "--endpoint", "http://127.0.0.1:1", "--model", "m"), "cannot be combined"),
        (("generate", "hello", "--model", "good.gguf", "-n", "-5"), "max_tokens"),
        (("generate", "hello", "--model", "good.gguf", "--temperature", "nan"), "temperature"),
        (("generate", b"\xff", "--model", "good.gguf"), "not valid UTF-8"),
        (("generate", "the " * 3000, "--model", "good.gguf"), "2048"),
        (("martian",), "martian"),
    ],
)
def test_a_wrong_command_line_is_one_line(line: CommandLine, arguments: tuple[str | bytes, ...], says: str) -> None:
    line.cluster_dir("tiny").joinpath("logs").mkdir(parents=True, exist_ok=True)
    done = line.run(*arguments)
    assert done.code == 2 and says in done.error


def test_what_cannot_be_written_is_one_line(line: CommandLine) -> None:
    (line.folder / "full").symlink_to("/dev/full")
    done = line.start("plan", line.cluster_file("good.gguf"), out=line.folder / "full").wait()
    assert done.code == 1 and "No space left on device" in done.error
