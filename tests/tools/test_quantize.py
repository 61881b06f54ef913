"""Tests of the commands `model quantize` and `model imatrix`: outputs, refusals, and interruptions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import eventually
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model
from support.seed import SEED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds an F16 model of two layers with experts."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return build_tiny_model(path, layers=2, experts=4, hidden=256, ffn=256, vocabulary=300, quant_type=QuantType.F16)


def run(*words: str | Path) -> str:
    """Returns the command's output; raises its error."""
    result = CliRunner().invoke(app, ["model", *map(str, words)], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def weights(file: ModelFile, name: str) -> np.ndarray:
    tensor = file.tensor(name)
    return dequantize(tensor.quant_type, tensor.read(), tensor.rows * tensor.shape[-1]).reshape(tensor.shape)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_quantized_model_has_the_same_weights_but_for_rounding(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    printed = run("quantize", model, out, "q4_k_m")
    assert "F16 -> Q4_K" in printed and "F32 -> F32" in printed and "bits a weight" in printed
    before, after = open_model(model), open_model(out)
    assert set(before.tensors) == set(after.tensors) and names(tmp_path) == {"out.gguf"}
    assert after.metadata["general.file_type"] == 15 and after.metadata["general.quantization_version"] == 2
    assert after.metadata["tokenizer.ggml.model"] == before.metadata["tokenizer.ggml.model"]
    for name, tensor in after.tensors.items():
        was, now = weights(before, name), weights(after, name)
        error = np.sqrt(((now - was) ** 2).mean() / (was**2).mean())
        assert error == 0 if tensor.quant_type == before.tensors[name].quant_type else 0 < error < 0.1, name


def test_tensors_of_kimi_linear_keep_their_shapes(tmp_path: Path) -> None:
    """Checks that shapes keep dimensions of one, which programs ignore, and that the program stays the same."""
    source = build_architecture(tmp_path / "in.gguf", "kimi-linear")
    run("quantize", source, tmp_path / "out.gguf", "Q8_0")
    before, after = open_model(source), open_model(tmp_path / "out.gguf")
    assert before.tensor("blk.0.ssm_conv1d_q.weight").shape == (1, 64, 1, 4)
    assert {name: t.shape for name, t in after.tensors.items()} == {name: t.shape for name, t in before.tensors.items()}
    with Model.open(source) as model, Model.open(tmp_path / "out.gguf") as quantized:
        assert model.program(0, model.layer_count) == quantized.program(0, model.layer_count)


def test_any_number_of_threads_writes_the_same_file(model: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        run("quantize", model, tmp_path / f"{threads}.gguf", "Q3_K_M", "-t", str(threads))
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_the_name_of_the_new_file_and_a_dry_run(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    source.symlink_to(model)
    assert "F16 -> Q8_0" in run("quantize", source, "Q8_0", "--dry-run")
    assert names(tmp_path) == {"tiny.gguf"}
    run("quantize", source, "Q8_0")
    assert names(tmp_path) == {"tiny.gguf", "tiny-Q8_0.gguf"}


def test_a_split_model_stays_split_where_that_is_wanted(model: Path, tmp_path: Path) -> None:
    whole, half = open_model(model), len(open_model(model).tensors) // 2
    for number in range(2):
        part = list(whole.tensors.values())[number * half : None if number else half]
        split: dict[str, WritableValue] = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(2),
            "split.tensors.count": len(whole.tensors),
        }
        sources = [TensorSource(t.name, t.quant_type, t.shape, t.read) for t in part]
        write_gguf(
            tmp_path / f"in-{number + 1:05}-of-00002.gguf",
            split if number else {**whole.metadata, **split},
            sources,
        )
    first = tmp_path / "in-00001-of-00002.gguf"
    run("quantize", first, tmp_path / "one.gguf", "Q4_0")
    run("quantize", first, tmp_path / "out.gguf", "Q4_0", "--keep-split")
    one, two = open_model(tmp_path / "one.gguf"), open_model(tmp_path / "out-00001-of-00002.gguf")
    assert len(one.parts) == 1 and len(two.parts) == 2 and "split.count" not in one.metadata
    assert all(two.tensors[name].read() == tensor.read() for name, tensor in one.tensors.items())
    assert not any(name.startswith(".") for name in names(tmp_path))
    with pytest.raises(LlamaclustError, match="the model itself"):
        run("quantize", first, tmp_path / "in.gguf", "Q4_0", "--keep-split")


def test_an_importance_matrix_of_the_model_itself(model: Path, tmp_path: Path) -> None:
    """Checks a matrix made from a text: unused experts count like the others, and types that need one become
    available."""
    text, matrix = tmp_path / "text", tmp_path / "matrix.gguf"
    text.write_text("the quick brown fox jumps over the lazy dog " * 12)
    run("imatrix", model, "-f", text, "-o", matrix, "-c", "64", "--chunks", "3", "-t", "2")
    read = read_imatrix(matrix)
    assert read.chunks == 3 and set(read.entries) == {
        f"blk.{layer}.{part}.weight"
        for layer in range(2)
        for part in (
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate_inp",
            "ffn_gate_exps",
            "ffn_up_exps",
            "ffn_down_exps",
        )
    }
    assert read.entries["blk.1.attn_q.weight"].counts.tolist() == [192]
    experts = read.entries["blk.1.ffn_down_exps.weight"]
    assert experts.counts.sum() == 2 * 192 and experts.sums.shape == (4, 256)
    run("imatrix", model, "-f", text, "-o", tmp_path / "again.gguf", "-c", "64", "--chunks", "3", "-t", "1")
    assert matrix.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    run("quantize", model, tmp_path / "out.gguf", "IQ2_XXS", "--imatrix", matrix)
    kinds = {tensor.quant_type for tensor in open_model(tmp_path / "out.gguf").tensors.values()}
    assert QuantType.IQ2_XXS in kinds


def _ones(model: Path, path: Path, leave_out: str = "", width: int = 256) -> Path:
    entries = {
        tensor.name: Importance(
            np.ones((tensor.shape[0] if len(tensor.shape) == 3 else 1, width), np.float32),
            np.ones(tensor.shape[0] if len(tensor.shape) == 3 else 1, np.float32),
        )
        for tensor in open_model(model).tensors.values()
        if len(tensor.shape) > 1 and tensor.name != leave_out
    }
    write_imatrix(path, ImportanceMatrix(entries, 1, 64, ("ones",)))
    return path


def test_what_is_refused_leaves_nothing(model: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized.gguf"
    run("quantize", model, quantized, "Q8_0")
    gap, narrow = _ones(model, tmp_path / "gap", "blk.1.attn_q.weight"), _ones(model, tmp_path / "narrow", width=128)
    noise = tmp_path / "noise"
    noise.write_bytes(Random(SEED).randbytes(100))
    before, out = names(tmp_path), tmp_path / "out.gguf"
    for words, says in (
        ((model, out, "Q9"), "type Q9 is not known"),
        ((tmp_path / "none.gguf", out, "Q8_0"), "none.gguf"),
        ((noise, out, "Q8_0"), "noise"),
        ((quantized, out, "Q4_0"), "is already Q8_0"),
        ((model, out, "IQ2_XS"), "needs an importance matrix: make one"),
        ((model, out, "Q2_K_S"), "needs an importance matrix"),
        ((model, out, "IQ2_XS", "--imatrix", gap), "blk.1.attn_q.weight as IQ2_XS needs .* has no entry for it"),
        ((model, out, "Q4_0", "--imatrix", narrow), "expected 256 values .* found 128"),
        ((model, out, "Q4_0", "--imatrix", noise), "not an importance matrix"),
        ((model, out, "Q4_0", "--imatrix", model), "expected general.type 'imatrix'"),
        ((model, out, "Q4_0", "--tensor-type", "attn_q"), "PATTERN=TYPE"),
        ((model, out, "Q4_0", "--tensor-type", "(=Q8_0"), "regular expression"),
        ((model, out, "Q4_0", "--tensor-type", "attn_q=Q9"), "give one of"),
        ((model, out, "Q4_0", "--tensor-type", "attn_z=Q8_0"), "no tensor name in"),
        ((model, out, "Q4_0", "--leave-output-tensor", "--output-tensor-type", "Q8_0"), "contradict"),
        ((model, model, "Q4_0"), "the model itself"),
        ((model, tmp_path, "Q4_0"), "a folder"),
        ((model, tmp_path / "no" / "out.gguf", "Q4_0"), "folder does not exist"),
    ):
        with pytest.raises(LlamaclustError, match=says) as caught:
            run("quantize", *words)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        assert names(tmp_path) == before, words
    run("quantize", quantized, out, "Q4_0", "--allow-requantize")


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, "f4"), (np.inf, "f2"), (-np.inf, "f4"), (1e30, "f4")])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, bad: float, dtype: str) -> None:
    x = np.ones((4, 64), dtype)
    x[2, 5] = bad
    path = tmp_path / "in.gguf"
    kind = QuantType.F32 if dtype == "f4" else QuantType.F16
    write_gguf(path, {"general.architecture": "llama"}, [TensorSource("blk.0.attn_q.weight", kind, x.shape, x.tobytes)])
    with pytest.raises(LlamaclustError, match=r"attn_q.* at row 2, column 5"):
        run("quantize", path, tmp_path / "out.gguf", "Q8_0")
    assert names(tmp_path) == {"in.gguf"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=18m", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_is_one_error_and_leaves_nothing(model: Path, small_disk: Path) -> None:
    (small_disk / "old.gguf").write_bytes(bytes(1 << 20))
    with pytest.raises(LlamaclustError, match=r"needs \d+ MiB on the disk, but \d+ MiB are free"):
        run("quantize", model, small_disk / "old.gguf", "F16")
    assert names(small_disk) == {"old.gguf"} and (small_disk / "old.gguf").stat().st_size == 1 << 20


_SLOW = """
import sys, time
from llamaclust.tools.quantize import quantize
once = quantize._quantized
quantize._quantized = lambda change, rows: (time.sleep(0.2), once(change, rows))[1]
sys.argv = ["llamaclust", "model", "quantize", *sys.argv[1:]]
from llamaclust.cli.main import main
main()
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
def test_broken_off_it_leaves_the_old_file_as_it_was(model: Path, tmp_path: Path, signal_name: str) -> None:
    import signal

    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    command = [sys.executable, "-c", _SLOW, str(model), str(out), "Q4_0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    eventually(lambda: len(names(tmp_path)) > 1 or process.poll() is not None, 60.0, "a file in the making")
    process.send_signal(getattr(signal, signal_name))
    printed, said = process.communicate(timeout=20)
    assert out.read_bytes() == b"old" and printed == b""
    if signal_name == "SIGINT":
        assert process.returncode == 130 and b"Traceback" not in said
        assert names(tmp_path) == {"out.gguf"}
    run("quantize", model, out, "Q4_0")
    assert names(tmp_path) == {"out.gguf"} and len(open_model(out).tensors) == len(open_model(model).tensors)


def test_what_is_made_from_a_pulled_model_goes_to_the_current_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that outputs are not beside pulled models, where `model rm` would delete them."""
    pulled, here = tmp_path / "home" / "models" / "mine", tmp_path / "here"
    pulled.mkdir(parents=True)
    here.mkdir()
    source = pulled / "tiny.gguf"
    source.write_bytes(model.read_bytes())
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(here)
    run("quantize", source, "Q8_0")
    run("split", source, "--split-max-tensors", "20")
    assert names(pulled) == {"tiny.gguf"}
    made = names(here)
    assert "tiny-Q8_0.gguf" in made and any("-00001-of-" in name for name in made)


def test_chunks_longer_than_the_model_knows_are_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("word " * 20)
    with pytest.raises(LlamaclustError, match=r"-c 99999: the model's context is \d+ tokens"):
        run("imatrix", model, "-f", text, "-o", tmp_path / "matrix", "-c", "99999")
