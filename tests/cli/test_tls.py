"""Tests of commands that call a cluster whose API uses TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.clusters.command_line import CommandLine

SMALL: dict[str, Any] = {"context_length": 64, "max_sequences": 2}


def test_commands_of_this_machine_need_no_option_and_others_the_file(line: CommandLine) -> None:
    started = line.run("up", "-d", line.cluster_file("good.gguf", listen_tls="self-signed", **SMALL))
    assert started.code == 0, started.err
    certificate = line.cluster_dir("tiny") / "api.crt"
    assert "certificate: SHA-256 " in started.err and f"--ca-file with a copy of {certificate}" in started.err
    api = line.run("status", "--json").json["api"]
    assert api.startswith("https://127.0.0.1:")
    here = line.run("generate", "the", "-n", "4")
    by_file = line.run("generate", "the", "-n", "4", "--endpoint", api, "--ca-file", certificate)
    assert here.code == 0 and by_file.out == here.out, here.err + by_file.err
    line.set_variables(LLAMACLUST_STATE_DIR=str(line.folder / "elsewhere"))
    stranger = line.run("generate", "the", "--endpoint", api)
    line.set_variables(LLAMACLUST_STATE_DIR=str(line.state_dir))
    assert stranger.code == 1 and "not trusted here" in stranger.error
    assert line.run("down").code == 0


def test_what_cannot_be_used_is_one_line(line: CommandLine, tmp_path: Path) -> None:
    files = {"certificate": str(tmp_path / "none.crt"), "key": str(tmp_path / "none.key")}
    refused = line.run("up", line.cluster_file("good.gguf", listen_tls=files, **SMALL))
    assert refused.code == 2 and "none.crt cannot be read" in refused.error
    refused = line.run("generate", "x", "--endpoint", "https://127.0.0.1:9", "--ca-file", tmp_path / "none")
    assert refused.code == 2 and "cannot read the certificates to trust" in refused.error
    refused = line.run("generate", "x", "--ca-file", tmp_path / "none")
    assert refused.code == 2 and "--ca-file is for --endpoint" in refused.error
