"""Tests of the command `model convert`: results, interruptions, a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llamaclust.model.gguf.model_file import open_model
from support.clusters.command_line import CommandLine, eventually, paused
from support.models.checkpoint_files import write_hugging_face
from support.models.random_checkpoints import CASES, checkpoint, values
from support.models.tiny_tokenizers import tokenizer_json

SLOW_WORDS = 1 << 19


def model(folder: Path, case: str = "LlamaForCausalLM") -> Path:
    config, tensors = checkpoint(case)
    write_hugging_face(folder, config, tensors)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


def slow_model(folder: Path) -> Path:
    """Writes a sparse checkpoint whose conversion is long enough to be interrupted."""
    import json

    config, shapes = CASES["LlamaForCausalLM"]
    config = {"architectures": ["LlamaForCausalLM"], **config, "intermediate_size": SLOW_WORDS}
    header, at = {}, 0
    for name, shape in shapes.items():
        wide = tuple(SLOW_WORDS if size == 96 else size for size in shape)
        end = at + 4 * int(np.prod(wide))
        header[name] = {"dtype": "F32", "shape": list(wide), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


def test_a_folder_becomes_a_file_that_answers(line: CommandLine) -> None:
    folder = model(line.folder / "tiny-llama")
    done = line.run("model", "convert", folder)
    assert (done.code, done.out) == (0, "tiny-llama-f16.gguf\n") and "MiB" in done.err
    said = line.run("generate", "the first word", "-n", "4", "--json", "--model", "tiny-llama-f16.gguf").json
    assert 1 <= len(said["token_ids"]) <= 4
    again = line.run("model", "convert", folder, "-o", "b.gguf", "--type", "q8_0", "--name", "Tiny")
    assert again.out == "b.gguf\n"
    found = open_model(line.folder / "b.gguf")
    assert found.metadata["general.name"] == "Tiny" and found.metadata["general.file_type"] == 7


@pytest.mark.parametrize("case", ["Qwen2ForCausalLM", "MixtralForCausalLM"])
def test_other_architectures_answer_too(case: str, line: CommandLine) -> None:
    folder = model(line.folder / "m", case)
    assert line.run("model", "convert", folder, "-o", "m.gguf").code == 0
    said = line.run("generate", "the first word", "-n", "4", "--json", "--model", "m.gguf").json
    assert 1 <= len(said["token_ids"]) <= 4


def test_mistakes_are_one_line_with_code_2(line: CommandLine) -> None:
    folder = model(line.folder / "m")
    for arguments, message in (
        ((line.folder / "absent",), "no such file or folder"),
        ((folder, "--type", "q3"), "give one of f32, f16, bf16, q8_0"),
        ((folder, "-o", "absent/x.gguf"), "the folder does not exist"),
        ((folder, "-o", folder), "a folder; give the name of a file"),
        ((folder, "--tokenizer", "absent"), "no such file"),
    ):
        done = line.run("model", "convert", *arguments)
        assert done.code == 2 and message in done.error, done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_an_interruption_leaves_the_old_file_and_a_rerun_works(number: signal.Signals, line: CommandLine) -> None:
    folder, out = slow_model(line.folder / "slow"), line.folder / "out.gguf"
    out.write_bytes(b"GGUF")
    running = line.start("model", "convert", folder, "-o", "out.gguf", "--type", "q8_0")
    part = line.folder / ".out.gguf.part"
    eventually(lambda: part.is_file() and part.stat().st_size > 0, 60.0, "the first bytes")
    with paused(running.process.pid):
        busy = line.run("model", "convert", model(line.folder / "m"), "-o", "out.gguf")
        assert busy.code == 2 and "another process is writing it" in busy.error
        os.kill(running.process.pid, number)
    assert running.wait().code == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert out.read_bytes() == b"GGUF" and part.is_file() == (number is signal.SIGKILL)
    assert line.run("model", "convert", line.folder / "m", "-o", "out.gguf").code == 0
    assert open_model(out).metadata["general.architecture"] == "llama" and not part.exists()


def test_a_disk_without_room_is_said_before_the_start(line: CommandLine) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system is mounted for this: root and mount are needed")
    small = line.folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        folder = slow_model(line.folder / "slow")
        done = line.run("model", "convert", folder, "-o", small / "x.gguf")
        assert done.code == 2 and "MiB on the disk, but 20 MiB are free" in done.error and not list(small.iterdir())
        tiny = model(line.folder / "m")
        assert line.run("model", "convert", tiny, "-o", small / "x.gguf").code == 0
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamaclust.core.errors import UsageError
    from llamaclust.model.gguf.atomic_file import new_file

    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with (
        pytest.raises(UsageError, match="the disk is full; 1 MiB are needed"),
        new_file(tmp_path / "x", 1 << 20) as file,
    ):
        os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        file.write(b"x" * (1 << 20))
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_by_the_command(line: CommandLine) -> None:
    import json

    from support.models.checkpoint_files import safetensors_bytes

    folder = model(line.folder / "base")
    one = line.folder / "adapter"
    one.mkdir()
    (one / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora"
    factors = {f"{name}_A.weight": values("A", (2, 64)), f"{name}_B.weight": values("B", (96, 2))}
    (one / "adapter_model.safetensors").write_bytes(safetensors_bytes(factors))
    done = line.run("model", "merge-lora", folder, one, "-o", "merged.gguf")
    assert (done.code, done.out) == (0, "merged.gguf\n")
    done = line.run("model", "merge-lora", "merged.gguf", one, "-o", "again.gguf")
    assert done.code == 2 and "the base must be a folder" in done.error
