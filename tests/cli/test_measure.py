"""Tests of `measure`, which repeats stored measurements, on a tiny model with two workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.state.measurements import OtherLoad, read_other_loads, read_profiles, write_profiles
from llamaclust.core.profile import Profile
from support.clusters.command_line import CommandLine

WORKERS = [{"name": "a", "threads": 1}, {"name": "b", "threads": 1}]
SPEEDS = {"memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}


@pytest.fixture(autouse=True)
def _each_ends_what_it_started(line: CommandLine) -> Iterator[None]:
    yield
    line.end_commands()


def file_of(line: CommandLine, name: str, **values: Any) -> Path:
    return line.cluster_file("good.gguf", name, **{"workers": WORKERS, **values})


def doubled(profile: Profile) -> Profile:
    return profile.map(lambda one: replace(one, read_bytes_s=2 * one.read_bytes_s, int8_macs_s=7.0))


def test_what_is_stored_is_replaced_and_shown_beside_the_new_values(line: CommandLine) -> None:
    state = line.folder / "fresh"
    file = file_of(line, "again", state_dir=str(state))
    first = line.run("measure", file, "--json").json
    (model,) = first["models"]
    assert [device["name"] for device in model["devices"]] == ["a", "b"] and model["not_measured"] == []
    figures = [figure for device in model["devices"] for figure in device["figures"]]
    assert {figure["name"] for figure in figures} == {"memory bandwidth", "integer products"}
    assert all(figure["measured"] > 0 and figure["stored"] is None is figure["ratio"] for figure in figures)
    kept = read_profiles(state)
    busy = OtherLoad(2, 1.4, 0.0)
    write_profiles(state, {key: doubled(profile) for key, profile in kept.items()}, busy)
    assert "speeds were measured while other programs used 1.4 of 2 cores: run `llamaclust measure`" in (
        line.run("plan", file).out
    )
    assert line.run("plan", file, "--json").json["other_loads"]["b"] == {"cores": 2, "others": 1.4, "stolen": 0.0}
    second = line.run("measure", file, "--json").json
    now = read_profiles(state)
    assert now.keys() == kept.keys() and all(profile.cpu.int8_macs_s > 7.0 for profile in now.values())
    assert busy not in read_other_loads(state).values()
    for device in second["models"][0]["devices"]:
        rate = next(figure for figure in device["figures"] if figure["unit"] == "GMAC/s")
        assert rate["stored"] == pytest.approx(7e-9) and rate["ratio"] == pytest.approx(rate["measured"] / 7e-9)
    shown = line.run("measure", file)
    assert shown.code == 0 and shown.out.count("ratio") == 4 and "worker b: memory bandwidth" in shown.out
    assert not line.left_running()


def test_speeds_of_the_cluster_file_are_not_measured(line: CommandLine) -> None:
    file = file_of(line, "stated", workers=[{**WORKERS[0], **SPEEDS}, WORKERS[1]])
    (model,) = line.run("measure", file, "--json").json["models"]
    assert model["not_measured"] == ["a"] and [device["name"] for device in model["devices"]] == ["b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--set", "launcher=static", "--set", "workers=2"),
            "launcher static: `measure` starts workers on this machine only",
        ),
        (("--set", "model=absent.gguf"), "absent.gguf"),
        (("--workers", "2"), "--workers"),
        (("--set", "nonsense=1"), "nonsense"),
    ],
    ids=["launcher", "model", "workers", "key"],
)
def test_what_cannot_be_measured_is_refused(line: CommandLine, arguments: tuple[str, ...], words: str) -> None:
    refused = line.run("measure", file_of(line, "refused"), *arguments)
    assert refused.code == 2 and words in refused.error


def test_a_running_cluster_is_not_measured(line: CommandLine) -> None:
    with line.cluster("good.gguf", workers=WORKERS) as cluster:
        refused = line.run("measure", line.cluster_file("good.gguf", cluster.name, workers=WORKERS))
    assert refused.code == 2 and "is already running" in refused.error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_measurement_that_is_ended_leaves_nothing(line: CommandLine, number: signal.Signals) -> None:
    measuring = line.start("measure", file_of(line, "ended"))
    measuring.workers(2)
    measuring.process.send_signal(number)
    assert measuring.wait().code != 0
    assert not line.left_running() and not (line.cluster_dir("ended") / "run").exists()
