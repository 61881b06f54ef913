"""Tests of public models by name: the table, resolved names, pulls from a server like the hub, licences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llamaclust.cli import up
from llamaclust.cli.app import app
from llamaclust.cluster.config.catalog import (
    WantedFile,
    catalog_names,
    find_entry,
    locate,
    remove_model,
    resolve_model,
    stored_models,
)
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.model_sources import HubFile
from llamaclust.cluster.config.public_models import PublicModel, public_models, terms_of
from llamaclust.core.errors import DownloadError, UsageError
from llamaclust.tools.hub.download import DownloadLimits
from llamaclust.tools.hub.pull import pull_model
from support.hub.download_server import Server, running_server
from support.hub.hub_files import offer

QUICK = DownloadLimits(tries=2, first_pause_s=0.01, longest_pause_s=0.05, deadline_s=30.0)
MODEL = b"GGUF" + random.Random(7).randbytes(9_996)
SPDX = {"Apache-2.0", "MIT", "CC-BY-NC-4.0"}
FILES = [(model, quantization) for model in public_models().values() for quantization in model.quantizations]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-such-folder"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server() as store, running_server() as served:
        monkeypatch.setenv("HF_ENDPOINT", f"{served.url}/")
        for model, quantization in FILES:
            wanted = locate(f"{model.name}:{quantization}")
            assert isinstance(wanted, WantedFile)
            for part in (*wanted.parts(), *filter(None, [wanted.projector])):
                assert isinstance(part.source, HubFile)
                offer(served, store, part.source.repository, part.source.file, MODEL)
        yield served


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["model", *arguments])


@pytest.mark.parametrize(("model", "quantization"), FILES, ids=lambda part: getattr(part, "name", part))
def test_every_name_is_one_file_of_the_hub(model: PublicModel, quantization: str) -> None:
    wanted = locate(f"{model.name}:{quantization}")
    assert isinstance(wanted, WantedFile) and isinstance(wanted.source, HubFile) and wanted.source.revision == "main"
    assert quantization in wanted.source.file.lower() and "{" not in wanted.source.file
    assert wanted.spec == f"{model.name}:{quantization}" and wanted.path.parent.name == f"{model.name}-{quantization}"
    assert 1e7 < model.about_bytes(quantization) < 1e12
    assert model.name == model.name.lower() and ":" not in model.name and "/" not in model.name
    assert model.licence in SPDX or (terms_of(model.licence) or "").startswith("https://")


def test_names_are_unique_and_the_usual_ones_are_there() -> None:
    names = catalog_names()
    assert len(names) == len(set(names)) and len({model.file for model in public_models().values()}) == len(names) - 1
    assert {"qwen3-8b", "gpt-oss-20b", "llama-3.1-8b-instruct", "gemma-3-4b-it"} <= set(names)


def test_the_default_is_q4_k_m_or_the_type_that_the_model_was_published_in() -> None:
    for name, source in (
        ("qwen3-8b", "hf:Qwen/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf"),
        ("qwen3-8b:Q8_0", "hf:Qwen/Qwen3-8B-GGUF/Qwen3-8B-Q8_0.gguf"),
        ("QWEN3-8B:Q8_0", "hf:Qwen/Qwen3-8B-GGUF/Qwen3-8B-Q8_0.gguf"),
        ("gpt-oss-20b", "hf:ggml-org/gpt-oss-20b-GGUF/gpt-oss-20b-mxfp4.gguf"),
    ):
        entry = find_entry(name)
        assert entry is not None and entry.source == source


def test_a_model_by_its_name(hub: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not downloaded yet; run: llamaclust model pull qwen3-8b$"):
        resolve_model("qwen3-8b", tmp_path)
    path = pull_model("qwen3-8b", models_dir=tmp_path, limits=QUICK)
    assert path == tmp_path / "qwen3-8b-q4_k_m" / "Qwen3-8B-Q4_K_M.gguf" and path.read_bytes() == MODEL
    other = pull_model("qwen3-8b:q8_0", models_dir=tmp_path, limits=QUICK)
    assert resolve_model("qwen3-8b", tmp_path) == resolve_model("qwen3-8b:Q4_K_M", tmp_path) == path
    assert resolve_model("qwen3-8b-q8_0", tmp_path) == resolve_model("qwen3-8b:q8_0", tmp_path) == other
    assert remove_model("qwen3-8b", tmp_path) == path.parent and other.is_file()


def test_a_model_of_several_files_by_its_name(hub: Server, tmp_path: Path) -> None:
    pull_model("gpt-oss-120b", models_dir=tmp_path, limits=QUICK)
    (stored,) = stored_models(tmp_path)
    assert (stored.name, stored.size_bytes) == ("gpt-oss-120b-mxfp4", 3 * len(MODEL))


def test_the_hub_may_have_moved_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as empty:
        empty.does.answers["/Qwen/Qwen3-8B-GGUF/resolve/main/Qwen3-8B-Q4_K_M.gguf"] = (404, {"X-Error-Code": "EntryNotFound"})  # fmt: skip # noqa: E501
        monkeypatch.setenv("HF_ENDPOINT", empty.url)
        with pytest.raises(DownloadError, match=r"Qwen3-8B-Q4_K_M\.gguf@main: the repository has no such file"):
            pull_model("qwen3-8b", models_dir=tmp_path, limits=QUICK)
    assert not stored_models(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-9b", "neither a file nor a known model, did you mean qwen3-8b or "),
        ("Qwen3-8", "did you mean qwen3-8b"),
        ("qwen3:8b", "did you mean qwen3-8b?"),
        ("qwen3-8b:q9_k", "no such quantization; the catalog has q4_k_m, q5_k_m, q6_k, q8_0"),
        ("gpt-oss-20b:q4_k_m", "no such quantization; the catalog has mxfp4"),
        ("zzzzzzzz", "a known model; `llamaclust model list` shows the known names"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_model(name, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_licence_is_said_before_the_first_byte(hub: Server) -> None:
    result = run("pull", "llama-3.2-1b-instruct")
    first, second, *_ = result.stderr.splitlines()
    assert "1.24 B parameters, Q4_K_M" in first and "bartowski/Llama-3.2-1B-Instruct-GGUF" in first
    assert second.startswith("licence: Llama 3.2 Community License (by using the model you accept it: https://")
    assert result.stdout.endswith("/Llama-3.2-1B-Instruct-Q4_K_M.gguf\n") and result.exit_code == 0
    assert "licence" not in run("pull", "llama-3.2-1b-instruct").stderr, "it is there"
    assert "licence: Apache-2.0\n" in run("pull", "qwen3-8b").stderr


def test_the_list_has_licences_sizes_and_what_is_there(hub: Server) -> None:
    run("pull", "qwen3-8b")
    text = run("list").stdout
    assert "gemma-3-4b-it:q4_k_m" in text and "Gemma Terms of Use; 3.9 B parameters" in text
    assert text.startswith("qwen3-8b-q4_k_m ") and "qwen3-8b:q4_k_m" not in text
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)["models"]}
    row = rows["llama-3.1-8b-instruct:q4_k_m"]
    assert row["licence"] == "Llama 3.1 Community License" and row["terms"].startswith("https://")
    assert row["path"] is None and 4e9 < row["size_bytes"] < 6e9 and rows["qwen3-8b-q4_k_m"]["path"]


def test_the_list_finds_models_by_their_properties(hub: Server) -> None:
    run("pull", "qwen3-vl-4b-instruct")
    stored, _, *others = run("list", "Images").stdout.splitlines()
    assert stored.startswith("qwen3-vl-4b-instruct-q4_k_m ") and len(others) > 5
    assert all("chat with images" in line for line in others)
    assert run("list", "zzz").stdout == "no model has a name or properties that contain zzz\n"


def test_up_pulls_the_model_of_a_cluster_file(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[ClusterConfig, list[Path]]] = []
    monkeypatch.setattr("llamaclust.cluster.server.serve.serve", lambda config, models, *_, **__: served.append((config, models)))  # fmt: skip # noqa: E501
    monkeypatch.setattr(up, "_tune_grpc", lambda: None)
    file = tmp_path / "cluster.yaml"
    file.write_text("name: named\nmodel: qwen3-8b:q8_0\nworkers: [{name: a}]\n")
    result = CliRunner().invoke(app, ["up", str(file)])
    assert "licence: Apache-2.0" in result.stderr, (result.output, result.exception)
    ((config, (model,)),) = served
    assert model.name == "Qwen3-8B-Q8_0.gguf" and model.read_bytes() == MODEL and config.model_name == "qwen3-8b:q8_0"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "Qwen/Qwen3-8B",
            "for a file on the Hugging Face hub, give hf:Qwen/Qwen3-8B/FILE.gguf, did you mean qwen3-8b?",
        ),
        ("x" * 5000, f"{'x' * 120}... (5000 characters): neither a file nor a known model; "),
        ("a/" + "x" * 5000, f"a/{'x' * 118}... (5002 characters): no such file"),
    ],
    ids=["repository", "long", "long path"],
)
def test_what_is_not_known_is_one_short_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        locate(spec)
    assert message in str(caught.value) and len(str(caught.value)) < 300
