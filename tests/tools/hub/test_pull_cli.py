"""Tests of the commands `llamaclust model ...`: results on standard output, separate progress, exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from llamaclust.cli.app import app
from llamaclust.cluster.config.environment import environment
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import WritableValue, write_gguf
from llamaclust.tools.hub import pull
from llamaclust.tools.model_info import describe
from support.models.tiny_model import build_tiny_model
from support.paths import DATA

VOCABULARY = DATA / "tokenizers" / "ggml-vocab-llama-spm.gguf"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    build_tiny_model(path)
    return path


def run(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["model", *arguments], input=text)


def test_the_models_directory_follows_the_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment().models_dir == home / "models"
    monkeypatch.setenv("LLAMACLUST_HOME", "~/elsewhere")
    assert environment().models_dir == Path.home() / "elsewhere" / "models"


def test_list_and_rm(home: Path) -> None:
    before, _, after = run("list").stdout.partition("not downloaded; run: llamaclust model pull NAME\n")
    assert before == "" and after.startswith("  smollm2-135m-instruct ")
    directory = home / "models" / "web-x-1"
    directory.mkdir(parents=True)
    (directory / "m.gguf").write_bytes(b"x" * 1024)
    (directory / ".n.gguf.part").write_bytes(b"x")
    rows = json.loads(run("list", "--json").stdout)["models"]
    assert [row["name"] for row in rows[:2]] == ["web-x-1", "smollm2-135m-instruct"]
    assert rows[0]["path"] == str(directory / "m.gguf") and rows[0]["size_bytes"] == 1024
    assert rows[1]["path"] is None
    assert "not downloaded" not in run("list", "web-x").stdout
    assert run("rm", "web-x-1").stdout.strip() == str(directory)
    assert not directory.exists()
    assert isinstance(run("rm", "web-x-1").exception, UsageError)


def test_pull_of_a_file_that_is_there_prints_its_path(tiny: Path) -> None:
    result = run("pull", str(tiny))
    assert (result.exit_code, result.stdout.strip()) == (0, str(tiny))
    assert isinstance(run("pull", "no-such-model").exception, UsageError)


def test_nothing_is_downloaded_before_all_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(pull, "pull_model", lambda model, *_: asked.append(model))
    for last in ("nope", "hf:a/b/m-00002-of-00003.gguf"):
        error = run("pull", "qwen3-8b", "gpt-oss-20b", last).exception
        assert isinstance(error, UsageError) and last in str(error) and not asked
    assert run("pull", "qwen3-8b", "gpt-oss-20b").exit_code == 0 and asked == ["qwen3-8b", "gpt-oss-20b"]


def test_list_of_names_that_contain_a_text(home: Path) -> None:
    for name in ("web-qwen3-1", "web-x-2"):
        (home / "models" / name).mkdir(parents=True)
        (home / "models" / name / "m.gguf").write_bytes(b"x")
    names = [row["name"] for row in json.loads(run("list", "QWEN3", "--json").stdout)["models"]]
    assert {"web-qwen3-1", "qwen3-8b:q4_k_m"} <= set(names) and all("qwen3" in name for name in names)
    text = run("list", "qwen3").stdout
    assert "web-qwen3-1 " in text and "  qwen3-8b:" in text and "web-x-2" not in text and "gpt-oss" not in text
    assert run("list", "nothing-like-it").stdout == "no model has a name or properties that contain nothing-like-it\n"


def test_tokenize_reads_an_argument_or_standard_input() -> None:
    assert run("tokenize", str(VOCABULARY), "Hello world").stdout == "1 15043 3186\n"
    assert run("tokenize", str(VOCABULARY), "--no-special", text="Hello world").stdout == "15043 3186\n"
    assert run("tokenize", str(VOCABULARY), "--no-special", text="Hello\n").stdout == "15043 13\n"
    assert run("tokenize", str(VOCABULARY), "").stdout == "1\n"
    found = json.loads(run("tokenize", str(VOCABULARY), "a</s>", "--json", "--parse-special").stdout)
    assert found == {"token_ids": [1, 263, 2], "tokens": ["<s>", "▁a", "</s>"]}
    assert 2 not in json.loads(run("tokenize", str(VOCABULARY), "a</s>", "--json").stdout)["token_ids"]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    for arguments, text in (
        (("tokenize", str(VOCABULARY)), b"\xff\xff"),
        (("tokenize", str(broken), "x"), None),
        (("tokenize", "nowhere.gguf", "x"), None),
        (("info", str(broken)), None),
    ):
        error = run(*arguments, text=text).exception
        assert isinstance(error, LlamaclustError) and error.exit_code == 2
        assert "\n" not in str(error)


def test_info_counts_every_weight_once(tiny: Path) -> None:
    model = open_model(tiny)
    found = describe(model)
    assert found.total.bytes == sum(tensor.n_bytes for tensor in model.tensors.values())
    for shares in (found.by_type, (*found.layers, *found.outside)):
        assert sum(share.parameters for share in shares) == found.total.parameters > 0
        assert sum(share.tensors for share in shares) == found.total.tensors == len(model.tensors)
    assert [share.name for share in found.layers] == [str(i) for i in range(len(found.layers))]


def test_info_is_json_where_numbers_are_none(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    odd: dict[str, WritableValue] = {
        "general.architecture": "llama",
        "a": math.nan,
        "b": math.inf,
        "c": np.array([1, -math.inf], np.float32),
    }
    write_gguf(tmp_path / "odd.gguf", odd, [])
    found = json.loads(run("info", str(tmp_path / "odd.gguf"), "--json").stdout, parse_constant=refuse)["metadata"]
    assert (found["a"], found["b"], found["c"]) == ("nan", "inf", [1.0, "-inf"])


def test_info_as_text_and_as_json(tiny: Path) -> None:
    text = run("info", str(tiny)).stdout
    assert "general.architecture = " in text and "by layer" in text and "outside the layers" in text
    layers = describe(open_model(tiny)).layers
    assert len({(layer.parameters, layer.bytes) for layer in layers}) == 1, "of this model"
    assert f"  0-{len(layers) - 1}, each" in text and "\n  1 " not in text, "layers of the same size are one row"
    shown = json.loads(run("info", str(tiny), "--json").stdout)
    assert shown["parameters"] == describe(open_model(tiny)).total.parameters
    assert 1 < shown["bits_per_weight"] <= 32
    assert shown["metadata"]["tokenizer.ggml.tokens"]["array_of"] == "text"
    assert shown["path"] == str(tiny) and shown["size_bytes"] == tiny.stat().st_size
    vocabulary = json.loads(run("info", str(VOCABULARY), "--json").stdout)
    assert (vocabulary["parameters"], vocabulary["bits_per_weight"], vocabulary["layers"]) == (0, 0.0, [])
