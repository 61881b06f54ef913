"""Tests of `status` and `down --all` while several clusters run on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from support.clusters.command_line import CommandLine, eventually

NAMES = ("attic", "cellar", "hall")
ONE = [{"name": "a", "threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}]


@pytest.fixture
def several(line: CommandLine) -> Iterator[CommandLine]:
    for name in NAMES:
        started = line.run("up", line.cluster_file("good.gguf", name, workers=ONE), "--detach")
        assert started.code == 0, started.err
    yield line
    line.run("down", "--all")


def test_all_are_listed_and_stopped(several: CommandLine) -> None:
    listed = several.run("status")
    assert several.run("status", "--all").out == listed.out
    lines = listed.out.splitlines()
    assert listed.code == 0 and [text.partition(": ")[0] for text in lines] == [*NAMES]
    for name, text in zip(NAMES, lines, strict=True):
        state = several.run("status", "--cluster", name, "--json").json
        assert text.startswith(f"{name}: ready, good at {state['api']} (pid {state['pid']})")
        assert text.endswith("; 0 running, 0 waiting, workers: 1")
    states = several.run("status", "--all", "--json").json["clusters"]
    assert [(state["name"], state["state"]) for state in states] == [(name, "ready") for name in NAMES]
    for command in (("down",), ("status", "--watch"), ("status", "--json"), ("generate", "x"), ("logs", "a")):
        refused = several.run(*command)
        assert refused.code == 2 and "choose one of attic, cellar, hall with --cluster" in refused.error
    for name in ("down", "status"):
        both = several.run(name, "--all", "--cluster", "hall")
        assert both.code == 2 and "--all" in both.error
    told = several.run("down", "--all").err.splitlines()
    assert sorted(text for text in told if "requests are finished" not in text) == [
        f"{name} is stopped" for name in NAMES
    ]
    for command in (("down", "--all"), ("status",)):
        assert "no cluster is running" in several.run(*command).error


def test_one_that_cannot_be_reached_keeps_no_other_from_being_listed_and_stopped(several: CommandLine) -> None:
    folder = ClusterDir(several.cluster_dir("barn"))
    with folder.locked():
        folder.write_record(ClusterRecord("barn", os.getpid(), "http://127.0.0.1:9", "m", start_ticks=1))
        listed = several.run("status")
        assert [text.partition(": ")[0] for text in listed.out.splitlines() if "ready" in text] == [*NAMES]
        assert "cluster barn at http://127.0.0.1:9 does not answer" in listed.out
        broken = several.run("status", "--all", "--json").json["clusters"][1]
        assert broken.keys() == {"name", "api", "pid", "error"} and broken["name"] == "barn"
        stopped = several.run("down", "--all")
        assert stopped.code == 1 and "cluster barn: its record has pid" in stopped.err.splitlines()[-1]
        assert all(f"{name} is stopped" in stopped.err for name in NAMES)
        folder.remove_record()


@pytest.mark.parametrize("thing", ["pipe", "device", "folder"])
def test_what_is_no_log_is_refused(line: CommandLine, thing: str) -> None:
    folder = ClusterDir(line.cluster_dir("barn"))
    folder.create()
    log = folder.log_file(thing)
    match thing:
        case "pipe":
            os.mkfifo(log)
        case "device":
            log.symlink_to("/dev/zero")
        case _:
            log.mkdir()
    done = line.run("logs", thing, "--cluster", "barn", within_s=60)
    assert done.code == 2 and done.error.endswith("; remove it") and str(log) in done.error


def test_a_log_that_is_emptied_is_followed(line: CommandLine) -> None:
    folder = ClusterDir(line.cluster_dir("barn"))
    with folder.locked():
        folder.write_record(ClusterRecord("barn", os.getpid(), "http://127.0.0.1:9", "m"))
        folder.log_file("a").write_text("before\n" * 100)
        following = line.start("logs", "a", "--follow")
        eventually(lambda: following.out.read_text().count("before") == 100, 60, "the log so far")
        os.truncate(folder.log_file("a"), 0)
        with folder.log_file("a").open("a") as log:
            log.write("behind\n")
        eventually(lambda: following.out.read_text().endswith("behind\n"), 60, "the log behind")
        following.press_ctrl_c()
        following.wait()
        folder.remove_record()
