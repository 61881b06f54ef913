"""Tests of `hf:` models from local servers like the hub, and of large files over several connections."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from llamaclust.cluster.config.catalog import remove_model, resolve_model, stored_models
from llamaclust.cluster.config.environment import hub_settings
from llamaclust.cluster.config.model_sources import HubFile, parse_source
from llamaclust.core.errors import DownloadError, UsageError
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.hub import download
from llamaclust.tools.hub.download import DownloadLimits
from llamaclust.tools.hub.pull import pull_model
from llamaclust.tools.progress import silent
from llamaclust.tools.split import SplitRules, plan_split, write_parts
from support.hub.download_server import Server, running_server
from support.hub.hub_files import COMMIT, offer
from support.network.loopback import free_port
from support.seed import SEED

QUICK = DownloadLimits(tries=4, first_pause_s=0.01, longest_pause_s=0.05, deadline_s=30.0)
MODEL = b"GGUF" + random.Random(7).randbytes(299_996)
TOKEN = "hf_abcdefgh"
SPEC = "hf:some/repo/dir/m.gguf"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-such-folder"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store() -> Iterator[Server]:
    """Serves file contents from another origin, to which the hub redirects."""
    with running_server() as served:
        yield served


@pytest.fixture
def hub(store: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server() as served:
        monkeypatch.setenv("HF_ENDPOINT", f"{served.url}/")
        offer(served, store, "some/repo", "dir/m.gguf", MODEL)
        yield served


def test_a_file_of_the_hub(hub: Server, store: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run: llamaclust model pull hf:some/repo/dir/m\.gguf"):
        resolve_model(SPEC, tmp_path)
    store.does.drop_after, store.does.drops = 100_000, 2
    path = pull_model(SPEC, models_dir=tmp_path, limits=QUICK)
    assert path.read_bytes() == MODEL and path.name == "m.gguf" and path.parent.name.startswith("hf-some-repo-")
    assert store.does.ranges_asked == [None, "bytes=100000-", "bytes=200000-"]
    listing, head, *gets = (place for _, place, _ in hub.does.seen)
    assert (listing, head) == ("/api/models/some/repo/revision/main", "/some/repo/resolve/main/dir/m.gguf")
    assert {*gets} == {f"/some/repo/resolve/{COMMIT}/dir/m.gguf"}
    assert resolve_model(SPEC, tmp_path) == pull_model(SPEC, models_dir=tmp_path) == path
    assert remove_model(SPEC, tmp_path) == path.parent


def test_another_revision_is_another_model(hub: Server, store: Server, tmp_path: Path) -> None:
    path = pull_model(SPEC, models_dir=tmp_path, limits=QUICK)
    hub.does.answers["/some/repo/resolve/refs%2Fpr%2F1/dir/m.gguf"] = hub.does.answers[
        "/some/repo/resolve/main/dir/m.gguf"
    ]
    assert pull_model(f"{SPEC}@refs/pr/1", models_dir=tmp_path, limits=QUICK).parent != path.parent


def test_a_repository_that_was_renamed(hub: Server, tmp_path: Path) -> None:
    hub.does.answers["/old/name/resolve/main/dir/m.gguf"] = (307, {"Location": "/some/repo/resolve/main/dir/m.gguf"})
    hub.does.answers[f"/old/name/resolve/{COMMIT}/dir/m.gguf"] = (307, {"Location": f"/some/repo/resolve/{COMMIT}/dir/m.gguf"})  # fmt: skip # noqa: E501
    assert pull_model("hf:old/name/dir/m.gguf", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL


def test_the_token_goes_to_the_hub_alone(
    hub: Server, store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pull_model(SPEC, models_dir=tmp_path, limits=QUICK)
    assert {token for _, _, token in hub.does.seen} == {f"Bearer {TOKEN}"}
    assert {token for _, _, token in store.does.seen} == {None}


def test_a_pull_that_brings_nothing_says_what_it_looked_up_and_leaves_nothing(tmp_path: Path) -> None:
    steps: list[str] = []
    address = f"http://127.0.0.1:{free_port()}/m.gguf"
    with pytest.raises(DownloadError):
        pull_model(address, lambda what, done, total: steps.append(what), models_dir=tmp_path, limits=QUICK)
    assert steps[0] == f"looking up {address}" and not list(tmp_path.iterdir())


def test_a_token_file_is_its_owners_alone(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    monkeypatch.setenv("HF_TOKEN_PATH", str(file))
    with pytest.raises(UsageError, match="other users may read this token"):
        pull_model(SPEC, models_dir=tmp_path, limits=QUICK)
    file.chmod(0o600)
    pull_model(SPEC, models_dir=tmp_path, limits=QUICK)
    assert {token for _, _, token in hub.does.seen} == {f"Bearer {TOKEN}"}


def test_no_token_over_plain_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    with pytest.raises(UsageError, match="a token is sent to https addresses only"):
        pull_model(SPEC, models_dir=tmp_path, limits=QUICK)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "EntryNotFound", "has no such file at revision main"),
        (404, "RevisionNotFound", "has no revision main"),
        (401, "RepoNotFound", "no such repository, or a private one: give a token in HF_TOKEN"),
        (403, "GatedRepo", "accept the repository's conditions on its page first"),
        (401, "", "the hub answered 401: give a token"),
        (410, "", "the hub answered 410 Gone"),
        (503, "", "the hub answered 503"),
    ],
)
def test_refusals_say_what_to_do(status: int, code: str, message: str, hub: Server, tmp_path: Path) -> None:
    hub.does.answers["/some/repo/resolve/main/dir/m.gguf"] = (status, {"X-Error-Code": code} if code else {})
    with pytest.raises(DownloadError, match=message):
        pull_model(SPEC, models_dir=tmp_path, limits=QUICK)


def test_wrong_bytes_are_deleted(hub: Server, store: Server, tmp_path: Path) -> None:
    offer(hub, store, "some/repo", "dir/m.gguf", MODEL, digest="a" * 64)
    with pytest.raises(DownloadError, match="SHA-256 is not"):
        pull_model(SPEC, models_dir=tmp_path, limits=QUICK)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


@pytest.mark.parametrize(
    "spec",
    [
        "hf:a/m.gguf",
        "hf:a/b/../m.gguf",
        "hf:a/b/",
        "hf:a b/c/m.gguf",
        "hf:a/b/m.gguf@",
        "hf:a/b/m.gguf@../../x",
        "hf:a/b/m.gguf@a//b",
    ],
)
def test_what_names_no_file(spec: str) -> None:
    with pytest.raises(UsageError, match="must have the form hf:OWNER/NAME/FILE"):
        parse_source(spec)


@pytest.mark.parametrize("spec", ["http://[::1", "https://[x]/m.gguf"])
def test_what_is_no_address(spec: str) -> None:
    with pytest.raises(UsageError, match="the address is invalid"):
        parse_source(spec)


def test_what_is_read_of_specs_and_variables(tmp_path: Path) -> None:
    assert parse_source("hf:a/b/d/m.gguf@v1") == HubFile("a/b", "d/m.gguf", "v1")
    found = hub_settings({"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)})
    assert (found.endpoint, found.token) == ("https://huggingface.co", TOKEN)
    assert (found.token_file, found.token_file_named) == (tmp_path / "token", False)
    with pytest.raises(UsageError, match="HF_ENDPOINT=mirror"):
        hub_settings({"HF_ENDPOINT": "mirror"})


# -- split models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    data = [np.full(9000, number, np.float32).tobytes() for number in range(3)]
    sources = [
        TensorSource(f"t{number}", QuantType.F32, (9000,), partial(bytes, stored)) for number, stored in enumerate(data)
    ]
    write_gguf(folder / "whole.gguf", {"general.architecture": "llama"}, sources)
    planned = plan_split(open_model(folder / "whole.gguf"), folder / "m", SplitRules(most_tensors=1))
    write_parts(planned, silent)
    return [part.path for part in planned]


@pytest.mark.parametrize("kind", ["hub", "web"])
def test_all_parts_of_a_split_model_are_pulled(
    kind: str, parts: list[Path], hub: Server, store: Server, tmp_path: Path
) -> None:
    for part in parts:
        offer(hub, store, "some/repo", f"q/{part.name}", part.read_bytes())
        store.does.files[f"/q/{part.name}"] = part.read_bytes()
    store.does.drop_after, store.does.drops = 20_000, 2
    folder = "hf:some/repo/q" if kind == "hub" else f"{store.url}/q"
    said: list[str] = []
    first = pull_model(f"{folder}/{parts[0].name}", lambda *what: said.append(what[0]), models_dir=tmp_path, limits=QUICK)  # fmt: skip # noqa: E501
    assert [path.read_bytes() for path in open_model(first).parts] == [part.read_bytes() for part in parts]
    first_step, *steps = (step for step in dict.fromkeys(said) if "projector" not in step)
    assert first_step == f"looking up {folder}/{parts[0].name}"
    assert steps == [f"part {number} of 3: downloading" for number in (3, 2, 1)]
    (stored,) = stored_models(tmp_path)
    assert (stored.path, stored.size_bytes) == (first, sum(part.stat().st_size for part in parts))
    with pytest.raises(UsageError, match=r"part 2 of 3; give the first part, m-00001-of-00003\.gguf"):
        pull_model(f"{folder}/{parts[1].name}", models_dir=tmp_path)


def test_without_its_last_part_it_is_not_there_and_others_are_not_fetched_again(
    parts: list[Path], hub: Server, store: Server, tmp_path: Path
) -> None:
    for part in parts:
        offer(hub, store, "some/repo", part.name, part.read_bytes())
    place = f"/some/repo/resolve/{COMMIT}/{parts[0].name}"
    answer, hub.does.answers[place] = hub.does.answers[place], (404, {})
    spec = f"hf:some/repo/{parts[0].name}"
    with pytest.raises(DownloadError, match="answered 404"):
        pull_model(spec, models_dir=tmp_path, limits=QUICK)
    with pytest.raises(UsageError, match="not downloaded yet"):
        resolve_model(spec, tmp_path)
    hub.does.answers[place] = answer
    store.does.requests = 0
    pull_model(spec, models_dir=tmp_path, limits=QUICK)
    assert store.does.requests == 1


def test_room_for_all_parts_is_asked_for_first(
    parts: list[Path], hub: Server, store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in parts:
        offer(hub, store, "some/repo", part.name, part.read_bytes())
    free = (1 << 26) + sum(part.stat().st_size for part in parts) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))
    with pytest.raises(DownloadError, match="are free"):
        pull_model(f"hf:some/repo/{parts[0].name}", models_dir=tmp_path, limits=QUICK)
    assert store.does.requests == 0


# -- several connections -----------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_LARGE_BYTES", 50_000)
    monkeypatch.setattr(download, "_PIECE_BYTES", 40_000)


@pytest.mark.usefixtures("pieces")
def test_a_large_file_comes_in_ranges(store: Server, tmp_path: Path) -> None:
    store.does.files["/m.gguf"] = MODEL
    path = pull_model(f"{store.url}/m.gguf", models_dir=tmp_path, limits=QUICK)
    assert path.read_bytes() == MODEL
    asked = sorted(int(one.removeprefix("bytes=").partition("-")[0]) for one in store.does.ranges_asked[1:] if one)
    assert asked == list(range(0, len(MODEL), 40_000))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("drops", [1, 5, 9])
def test_lost_connections_of_ranges_are_gone_on_with(drops: int, store: Server, tmp_path: Path) -> None:
    """Checks that bytes received before a loss are kept, so that large pieces arrive over a bad connection."""
    store.does.files["/m.gguf"] = MODEL
    store.does.drop_after, store.does.drops = 15_000, drops
    path = pull_model(f"{store.url}/m.gguf", models_dir=tmp_path, limits=QUICK)
    assert path.read_bytes() == MODEL and store.does.drops == 0


@pytest.mark.usefixtures("pieces")
def test_a_file_that_changes_meanwhile_is_fetched_anew(store: Server, tmp_path: Path) -> None:
    """Checks that a new ETag makes the server send the whole file instead of a range."""
    store.does.files["/m.gguf"] = MODEL
    other = b"GGUF" + random.Random(f"other {SEED}").randbytes(299_996)

    def change(what: str, done_bytes: int, total_bytes: int | None) -> None:
        store.does.files["/m.gguf"], store.does.etag = other, '"v2"'

    path = pull_model(f"{store.url}/m.gguf", change, models_dir=tmp_path, limits=QUICK)
    assert path.read_bytes() == other


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("without", ["ranges", "etag"])
def test_where_ranges_cannot_be_trusted_one_connection_does(without: str, store: Server, tmp_path: Path) -> None:
    store.does.files["/m.gguf"] = MODEL
    setattr(store.does, without, False if without == "ranges" else None)
    path = pull_model(f"{store.url}/m.gguf", models_dir=tmp_path, limits=QUICK)
    assert path.read_bytes() == MODEL and store.does.ranges_asked == [None]


def test_proxies_of_the_environment_are_used(store: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.does.files["http://192.0.2.7/m.gguf"] = MODEL
    monkeypatch.setenv("HTTP_PROXY", store.url)
    assert (
        pull_model(
            f"http://192.0.2.7/m.gguf#sha256={hashlib.sha256(MODEL).hexdigest()}", models_dir=tmp_path, limits=QUICK
        ).read_bytes()
        == MODEL
    )


@pytest.mark.parametrize("place", ["http://127.0.0.1:99999/x", "http://[::1", "//[/x"])
def test_a_redirect_to_no_address_is_refused(place: str, hub: Server, tmp_path: Path) -> None:
    hub.does.answers["/some/repo/resolve/main/dir/m.gguf"] = (302, {"Location": place})
    with pytest.raises(DownloadError):
        pull_model(SPEC, models_dir=tmp_path, limits=QUICK)


def test_numbers_without_end_are_none(store: Server, tmp_path: Path) -> None:
    store.does.answers["/m.gguf"] = (206, {"Content-Range": f"bytes {'9' * 5000}-1/2"})
    with pytest.raises(DownloadError, match="the server sent bytes from -1"):
        pull_model(f"{store.url}/m.gguf", models_dir=tmp_path, limits=QUICK)


def test_a_range_that_does_not_end_is_hung_up_on() -> None:
    """Checks that bytes beyond the range are refused before they fill memory."""
    given = 0

    def body() -> Iterator[bytes]:
        nonlocal given
        for _ in range(1000):
            given += 1000
            yield bytes(1000)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(206, headers={"Content-Range": "bytes 0-4999/9999"}, content=body())

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        source = download.RangeSource(client, "http://x/m.gguf", {}, time.monotonic() + 30)
        (piece,) = source.pieces(0, 5000)
    assert piece.failure == "the server sent more than the requested range" and not piece.data and given < 10_000
