"""Tests of `up` and `plan` without a cluster file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cli.cluster_source import cluster_source, mmproj_override
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.writer import WritableValue, write_gguf
from support.clusters.command_line import CommandLine, command_line
from support.models.hostile_models import tiny
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        tiny(line.folder / "Good one (2).gguf")
        yield line


def described(source: str | None, workers: int | None = None, *overrides: str, discover: bool = False) -> ClusterConfig:
    return load_config(*cluster_source(source, workers, overrides, discover=discover))


def test_a_model_is_served_by_one_worker_or_shared_by_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "Good one (2).gguf")
    alone = described("Good one (2).gguf")
    assert (alone.name, alone.model) == ("good-one-2", str(tmp_path / "Good one (2).gguf"))
    assert ([worker.name for worker in alone.workers], alone.objective) == (["a"], "latency")
    shared = described("Good one (2).gguf", 3, "name=mine", "workers.1.threads=1")
    assert (shared.name, shared.objective) == ("mine", "throughput")
    assert [(worker.name, worker.threads) for worker in shared.workers] == [("a", None), ("b", 1), ("c", None)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("hf:some/repository/Model-Q4_K_M.gguf", "model-q4_k_m"),
        ("https://example.org/a/Model.gguf", "model"),
        ("hf:some/repository/" + "x" * 90 + ".gguf", "x" * 63),
        ("hf:some/repository/模型.gguf", "default"),
    ],
)
def test_clusters_are_named_after_their_models(source: str, name: str) -> None:
    config = described(source)
    assert (config.name, config.model) == (name, source)


def test_without_a_source_the_demo_has_as_many_workers_as_given() -> None:
    assert described(None).name == described(None, 3).name == "demo"
    assert [len(described(None, workers).workers) for workers in (None, 1, 3)] == [2, 1, 3]


def test_a_file_is_a_file_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cluster.yaml", "plain"):
        (tmp_path / name).write_text("name: filed\nmodel: smollm2-135m-instruct\nworkers: [{name: a}]\n")
        assert described(name).name == "filed"
    with pytest.raises(UsageError, match="--workers: the cluster file plain lists its workers"):
        described("plain", 2)
    with pytest.raises(UsageError, match=r"missing\.yaml: "):
        described("missing.yaml")
    with pytest.raises(UsageError, match=r"folder/missing: "):
        described("folder/missing")
    with pytest.raises(UsageError, match=r"missing\.gguf: no such file"):
        described("missing.gguf")
    with pytest.raises(UsageError, match="smollm2-135m-instruc: neither a file nor a known model, did you mean"):
        described("smollm2-135m-instruc")


def test_a_model_is_planned_and_served_without_a_file(line: CommandLine) -> None:
    plan = line.run("plan", "Good one (2).gguf", "--workers", "2", "--json").json
    assert [stage["worker"] for stage in plan["stages"]] == ["a", "b"]
    assert line.run("up", "Good one (2).gguf", "--workers", "2", "--port", "0", "--detach").code == 0
    try:
        status = line.run("status", "--json").json
        assert (status["name"], [worker["name"] for worker in status["workers"]]) == ("good-one-2", ["a", "b"])
    finally:
        assert line.run("down").code == 0


def test_a_cluster_that_is_discovered_awaits_workers_of_any_name(tmp_path: Path) -> None:
    model = described("smollm2-135m-instruct", 3, discover=True)
    assert (model.launcher, model.awaits_any, len(model.workers), model.join.discover) == ("static", True, 3, True)
    assert model.objective == "throughput", "a plan that uses all of them"
    assert len(described(None, discover=True).workers) == 1
    file = tmp_path / "home.yaml"
    file.write_text("name: home\nmodel: smollm2-135m-instruct\nlauncher: static\nworkers: 2\n")
    assert described(str(file), discover=True).join.discover


@pytest.mark.parametrize("keys", ["workers: [{name: a}]", "workers: 2\nlauncher: static\ninsecure: true"])
def test_only_workers_with_a_token_discover_a_cluster(tmp_path: Path, keys: str) -> None:
    file = tmp_path / "home.yaml"
    file.write_text(f"name: home\nmodel: smollm2-135m-instruct\n{keys}\n")
    with pytest.raises(UsageError, match=r"join\.discover: needs `launcher: static` and `insecure: false`"):
        described(str(file), discover=True)


@pytest.mark.parametrize("name", ["\U0001f999.gguf", "\U00020bb7 \U0001f600.gguf", 'a"\U0010ffff\\.gguf'])
def test_a_models_path_may_have_any_characters(name: str, tmp_path: Path) -> None:
    tiny(tmp_path / name)
    assert described(str(tmp_path / name)).model == str(tmp_path / name)


@pytest.mark.parametrize(
    "names", [["m.gguf"], ["m.GGUF"], ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], [".n.gguf", "m.gguf"]]
)
def test_a_folder_with_one_model_is_that_model(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (*names, "README.md"):
        (folder / name).touch()
    first = folder / next(name for name in names if name.startswith("m"))
    monkeypatch.chdir(tmp_path)
    for source in (str(folder), "folder", "./folder/"):
        found = described(source)
        assert (found.model, found.name) == (str(first), first.stem)
    monkeypatch.chdir(folder)
    assert described(".").model == str(first)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the folder has no model (.gguf file); give the path"),
        (["m-00002-of-00002.gguf"], "the folder has no model (.gguf file); give the path"),
        (["config.json", "model.safetensors"], "run: llamaclust model convert "),
        (["a.gguf", "b.gguf"], "the folder has 2 models; give one of a.gguf, b.gguf"),
        ([f"{number:02}.gguf" for number in range(12)], "09.gguf and 2 more"),
    ],
)
def test_a_folder_without_a_model_or_with_several(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UsageError) as refused:
        described(str(tmp_path))
    assert message in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("mmproj-F16.gguf", None),
        ("gemma-3-4b-MMPROJ.gguf", None),
        ("vision.gguf", {"general.architecture": "clip"}),
        ("a-projector.gguf", {"general.architecture": "llama", "general.type": "mmproj"}),
        ("poet.gguf", {"general.architecture": "llama", "general.type": "adapter"}),
        ("imatrix.gguf", {"general.type": "imatrix"}),
        ("odd.gguf", {"general.architecture": np.array([1, 2], np.uint32), "general.type": "imatrix"}),
    ],
)
def test_files_beside_the_model_of_a_folder_are_no_models(
    name: str, metadata: dict[str, WritableValue] | None, tmp_path: Path
) -> None:
    for model in ("m.gguf", "n.gguf"):
        write_gguf(tmp_path / model, {"general.architecture": "llama"}, ())
    if metadata is None:
        (tmp_path / name).touch()
    else:
        write_gguf(tmp_path / name, metadata, ())
    with pytest.raises(UsageError, match=r"the folder has 2 models; give one of m\.gguf, n\.gguf$"):
        described(str(tmp_path))
    (tmp_path / "n.gguf").unlink()
    assert described(str(tmp_path)).model == str(tmp_path / "m.gguf")


def test_a_projector_is_given_by_its_path_or_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        None: None,
        "off": "off",
        "auto": None,
        "p: [1].gguf": str(tmp_path / "p: [1].gguf"),
        "hf:a/b/mmproj.gguf": "hf:a/b/mmproj.gguf",
    }
    for choice, found in given.items():
        assert described("smollm2-135m-instruct", None, *mmproj_override(choice)).mmproj == found, choice


def test_plans_and_figures_of_a_model_with_a_projector(line: CommandLine) -> None:
    folder = line.folder / "seeing"
    folder.mkdir()
    model = build_tiny_model(folder / "m.gguf", hidden=TEXT_WIDTH, heads=4, layers=2)
    without = line.run("plan", model, "--json").json["stages"][0]
    assert without["encoder_bytes"] == 0 and line.run("model", "info", model, "--json").json["beside"] is None
    projector = build_projector(folder / "mmproj-m.gguf", "idefics3")
    (stage,) = line.run("plan", model, "--json").json["stages"]
    beside = line.run("model", "info", model, "--threads", "1", "--json").json["beside"]
    assert stage["encoder_bytes"] > beside["weight_bytes"] > 0 and beside["path"] == str(projector)
    assert beside["info"]["name"] == "idefics3" and beside["unused"] is None
    assert "beside it: mmproj-m.gguf" in line.run("model", "info", model).out
    assert "MiB encoder" in line.run("plan", model).out
    assert "encoder" not in line.run("plan", model, "--mmproj", "off").out
    other = build_projector(folder / "mmproj-n.gguf", "gemma3")
    assert "images are not read, because 2 projectors fit: " in line.run("plan", model).out
    assert "2 projectors fit" in line.run("model", "info", model).out
    assert "MiB encoder" in line.run("plan", model, "--mmproj", "seeing/mmproj-n.gguf").out
    refused = line.run("up", model, "--mmproj", model)
    assert refused.code == 2 and "a projector has 'clip'" in refused.err and other.is_file()
    assert line.run("plan", "--assume", "16GB", "--mmproj", other).code == 2


@pytest.mark.parametrize(
    "name", ["sha256-60e05f2100071479f596b964f89f510f057ce397ea22f2833a0cfe029bfc2463", "model.bin", "a.yaml"]
)
def test_a_model_file_needs_no_ending(tmp_path: Path, name: str) -> None:
    tiny(tmp_path / name)
    config = described(str(tmp_path / name))
    assert config.model == str(tmp_path / name) and config.name == Path(name).stem[:63]
    build_projector(tmp_path / "projector", "gemma3")
    assert mmproj_override(str(tmp_path / "projector")) == [f'mmproj="{tmp_path / "projector"}"']


@pytest.mark.parametrize("name", [b"a\xff.gguf", b"\xe9t\xe9.gguf", b"\xc3(.gguf", b"no ending \x80"])
def test_a_path_that_is_not_utf_8_is_named(tmp_path: Path, name: bytes) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    tiny(Path(path))
    with pytest.raises(UsageError, match="is not UTF-8: rename the file"):
        described(path)
    with pytest.raises(UsageError, match="is not UTF-8: rename the file"):
        mmproj_override(path)


@pytest.mark.parametrize(
    "text", ["listen=[::]:8080", "name=[a", "model={b", "listen=@home", "name=a: b: c", "model=*x"]
)
def test_a_value_that_is_no_yaml_is_shown_in_quotes(text: str) -> None:
    with pytest.raises(UsageError) as error:
        described(None, None, text)
    key, _, value = text.partition("=")
    quoted = f"--set '{key}=\"{value}\"'"
    assert str(error.value).endswith(f"put text in quotes: {quoted}") and "\n" not in str(error.value)
    assert getattr(described(None, None, f'{key}="{value}"') if key == "model" else None, "model", value) == value
