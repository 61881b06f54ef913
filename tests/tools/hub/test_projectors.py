"""Checks that projectors named in the catalog or found in hub repositories are downloaded with their models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaclust.cli.up import _model
from llamaclust.cluster.config.catalog import (
    CATALOG,
    WantedFile,
    find_entry,
    lacks_projector,
    locate,
    remove_model,
    resolve_model,
    stored_models,
)
from llamaclust.cluster.config.model_sources import HubFile
from llamaclust.cluster.config.public_models import public_models
from llamaclust.core.errors import DownloadError
from llamaclust.tools.hub.download import DownloadLimits
from llamaclust.tools.hub.projectors import projector_in
from llamaclust.tools.hub.pull import pull_model
from llamaclust.tools.progress import silent
from support.hub.download_server import Server, running_server
from support.hub.hub_files import offer

QUICK = DownloadLimits(tries=2, first_pause_s=0.01, longest_pause_s=0.05, deadline_s=30.0)
NAME, REPOSITORY = "smolvlm-500m-instruct", "ggml-org/SmolVLM-500M-Instruct-GGUF"
FILE, PROJECTOR = "SmolVLM-500M-Instruct-Q8_0.gguf", "mmproj-SmolVLM-500M-Instruct-Q8_0.gguf"
MODEL, ENCODER = b"GGUF" + bytes(9_000), b"GGUF" + bytes(4_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-such-folder"))
    with running_server() as store, running_server() as served:
        monkeypatch.setenv("HF_ENDPOINT", f"{served.url}/")
        offer(served, store, REPOSITORY, FILE, MODEL)
        yield served, store


def test_projectors_are_in_the_repository_of_their_model_and_found_by_their_name() -> None:
    seeing = [name for name, model in public_models().items() if model.mmproj]
    assert NAME in seeing and "gemma-3-4b-it" in seeing and "qwen3-vl-8b-instruct" in seeing
    for name in public_models():
        wanted = locate(name)
        assert isinstance(wanted, WantedFile) and isinstance(wanted.source, HubFile)
        assert (wanted.projector is not None) == (name in seeing)
        if wanted.projector is not None:
            assert isinstance(wanted.projector.source, HubFile) and wanted.projector.path.name.startswith("mmproj")
            assert wanted.projector.source.repository == wanted.source.repository
            assert wanted.projector.path.parent == wanted.path.parent
            assert all(part.projector is None for part in wanted.parts()[1:])
            entry = find_entry(name)
            assert entry is not None and "images" in entry.summary
    assert all(entry.projector is None for entry in CATALOG.values())


def test_a_model_is_complete_when_it_is_there(hub: tuple[Server, Server], tmp_path: Path) -> None:
    """Checks that the projector is downloaded before the model."""
    server, store = hub
    server.does.answers[f"/{REPOSITORY}/resolve/main/{PROJECTOR}"] = (404, {"X-Error-Code": "EntryNotFound"})
    with pytest.raises(DownloadError, match=f"{PROJECTOR}@main: the repository has no such file"):
        pull_model(NAME, models_dir=tmp_path, limits=QUICK)
    assert not stored_models(tmp_path)
    offer(server, store, REPOSITORY, PROJECTOR, ENCODER)
    path = pull_model(NAME, models_dir=tmp_path, limits=QUICK)
    assert path.name == FILE and path.read_bytes() == MODEL
    assert path.with_name(PROJECTOR).read_bytes() == ENCODER
    (stored,) = stored_models(tmp_path)
    assert (stored.path, stored.size_bytes) == (path, len(MODEL)), "the projector is no model"
    assert resolve_model(stored.name, tmp_path) == resolve_model(NAME, tmp_path) == path
    assert remove_model(NAME, tmp_path) == path.parent and not path.parent.exists()


def test_a_model_that_was_downloaded_without_its_projector_gets_it(hub: tuple[Server, Server], tmp_path: Path) -> None:
    server, store = hub
    offer(server, store, REPOSITORY, PROJECTOR, ENCODER)
    path = pull_model(NAME, models_dir=tmp_path, limits=QUICK)
    path.with_name(PROJECTOR).unlink()
    path.write_bytes(MODEL[:-1] + b"x")
    assert resolve_model(NAME, tmp_path) == path, "text needs no projector"
    assert pull_model(NAME, models_dir=tmp_path, limits=QUICK) == path
    assert path.with_name(PROJECTOR).read_bytes() == ENCODER and path.read_bytes()[-1:] == b"x"


def test_a_projector_can_be_downloaded_alone(hub: tuple[Server, Server], tmp_path: Path) -> None:
    server, store = hub
    offer(server, store, REPOSITORY, PROJECTOR, ENCODER)
    spec = f"hf:{REPOSITORY}/{PROJECTOR}"
    path = pull_model(spec, models_dir=tmp_path, limits=QUICK)
    assert resolve_model(spec, tmp_path) == path and [model.path for model in stored_models(tmp_path)] == [path]


def list_files(hub: Server, *files: str) -> None:
    listing = {"siblings": [{"rfilename": file} for file in files]}
    hub.does.files[f"/api/models/{REPOSITORY}/revision/main"] = json.dumps(listing).encode()


def test_a_file_of_the_hub_gets_the_projector_of_its_repository(hub: tuple[Server, Server], tmp_path: Path) -> None:
    server, store = hub
    list_files(server, "README.md", FILE, f"other/{PROJECTOR}", PROJECTOR, "mmproj-F32.gguf")
    offer(server, store, REPOSITORY, PROJECTOR, ENCODER)
    path = pull_model(f"hf:{REPOSITORY}/{FILE}", models_dir=tmp_path, limits=QUICK)
    assert sorted(each.name for each in path.parent.glob("*.gguf")) == [FILE, PROJECTOR]
    assert path.with_name(PROJECTOR).read_bytes() == ENCODER
    requests = len(server.does.seen)
    assert pull_model(f"hf:{REPOSITORY}/{FILE}", models_dir=tmp_path, limits=QUICK) == path
    assert len(server.does.seen) == requests, "it is complete"


@pytest.mark.parametrize(
    "listing",
    [
        b"",
        b"[]",
        b"{",
        100_000 * b"[",
        b'{"siblings": 1}',
        b'{"siblings": [1]}',
        b'{"siblings": [{"rfilename": "a.gguf"}]}',
    ],
)
def test_a_model_comes_alone_where_the_hub_lists_no_projector(
    listing: bytes, hub: tuple[Server, Server], tmp_path: Path
) -> None:
    hub[0].does.files[f"/api/models/{REPOSITORY}/revision/main"] = listing
    path = pull_model(f"hf:{REPOSITORY}/{FILE}", models_dir=tmp_path, limits=QUICK)
    assert [each.name for each in path.parent.glob("*.gguf")] == [FILE]


@pytest.mark.parametrize(
    ("model", "files", "projector"),
    [
        ("m.gguf", ("mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"), "mmproj-F16.gguf"),
        ("m.gguf", ("mmproj-BF16.gguf", "mmproj-m-q8_0.gguf"), "mmproj-m-q8_0.gguf"),
        ("m.gguf", ("mmproj-b.gguf", "MMPROJ-a.GGUF"), "MMPROJ-a.GGUF"),
        ("Q4/m-00001-of-00002.gguf", ("mmproj-F16.gguf", "Q8/mmproj-F16.gguf"), "mmproj-F16.gguf"),
        ("Q4/m.gguf", ("mmproj-F16.gguf", "Q4/mmproj-F32.gguf"), "Q4/mmproj-F32.gguf"),
        ("m.gguf", ("Q4/mmproj-F16.gguf", "mmproj.json", "my-mmproj.gguf", "m.gguf"), None),
    ],
)
def test_the_nearest_projector_is_chosen_with_f16_first(
    model: str, files: tuple[str, ...], projector: str | None
) -> None:
    assert projector_in(files, model) == projector_in(reversed(files), model) == projector


SPEC = f"hf:{REPOSITORY}/{FILE}"


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a model downloaded without its projector."""
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path))
    wanted = locate(SPEC)
    assert isinstance(wanted, WantedFile) and tmp_path in wanted.path.parents
    wanted.path.parent.mkdir(parents=True)
    wanted.path.write_bytes(MODEL)
    return wanted.path


@pytest.mark.parametrize("is_start", [False, True])
def test_a_downloaded_file_of_the_hub_gets_its_projector(
    is_start: bool, hub: tuple[Server, Server], downloaded: Path
) -> None:
    server, store = hub
    list_files(server, FILE, PROJECTOR)
    offer(server, store, REPOSITORY, PROJECTOR, ENCODER)
    assert lacks_projector(SPEC) and _model(SPEC, silent) == downloaded and not server.does.seen
    path = _model(SPEC, silent, is_auto=True) if is_start else pull_model(SPEC, limits=QUICK)
    assert path == downloaded and path.with_name(PROJECTOR).read_bytes() == ENCODER and not lacks_projector(SPEC)


def test_a_repository_without_projector_is_asked_once(hub: tuple[Server, Server], downloaded: Path) -> None:
    server, _ = hub
    list_files(server, FILE)
    for _ in range(2):
        assert pull_model(SPEC, limits=QUICK) == _model(SPEC, silent, is_auto=True) == downloaded
    assert len(server.does.seen) == 1 and not lacks_projector(SPEC)
    assert remove_model(SPEC) == downloaded.parent and not downloaded.parent.exists()


def test_a_downloaded_file_needs_no_hub(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert pull_model(SPEC, limits=QUICK) == _model(SPEC, silent, is_auto=True) == downloaded
    assert lacks_projector(SPEC), "the next start looks again"


def test_a_start_needs_no_projector_that_cannot_be_downloaded(hub: tuple[Server, Server], downloaded: Path) -> None:
    server, _ = hub
    list_files(server, FILE, PROJECTOR)
    server.does.answers[f"/{REPOSITORY}/resolve/main/{PROJECTOR}"] = (404, {"X-Error-Code": "EntryNotFound"})
    assert _model(SPEC, silent, is_auto=True) == downloaded
    with pytest.raises(DownloadError, match=f"{PROJECTOR}@main: the repository has no such file"):
        pull_model(SPEC, limits=QUICK)
