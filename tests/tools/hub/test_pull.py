"""Tests of downloads from a local server that drops connections, ignores ranges, or changes or damages files."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llamaclust.cluster.config import catalog
from llamaclust.cluster.config.catalog import CatalogEntry, locate, remove_model, resolve_model, stored_models
from llamaclust.core.errors import DownloadError, ModelFileError, UsageError
from llamaclust.tools.hub import download, pull
from llamaclust.tools.hub.download import Download, DownloadLimits, fetch
from llamaclust.tools.hub.package_index import PipSettings, pip_settings
from llamaclust.tools.hub.pull import pull_model
from support.hub.download_server import Handler, Server, running_server

QUICK = DownloadLimits(tries=4, first_pause_s=0.01, longest_pause_s=0.05, deadline_s=30.0)
MODEL = b"GGUF" + random.Random(7).randbytes(299_996)
MODEL_SHA256 = hashlib.sha256(MODEL).hexdigest()
MEMBER = "tiny_model/tiny.Q4_1.gguf"
WHEEL_NAME = "tiny_model-1.0-py3-none-any.whl"


def wheel_of(content: bytes, member: str = MEMBER) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("tiny_model/__init__.py"), "")
        archive.writestr(zipfile.ZipInfo(member), content)
    return data.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with running_server() as served:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{served.url}/simple")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CERT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pull, "pip_settings", settings_in_variables)
        yield served


def settings_in_variables() -> PipSettings:
    """Returns pip's settings from environment variables, without pip, which takes half a second."""
    urls = () if "PIP_NO_INDEX" in os.environ else (os.environ["PIP_INDEX_URL"],)
    return PipSettings(urls, tuple(os.environ.get("PIP_FIND_LINKS", "").split()), os.environ.get("PIP_CERT"))


@pytest.fixture
def queries_pip(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "pip_settings", pip_settings)


@pytest.fixture
def tiny(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Returns a server with a package index, one wheel, and a catalog entry for the model in it."""
    entry = CatalogEntry("tiny", f"pypi:Tiny.Model==1.0/{MEMBER}", len(MODEL), MODEL_SHA256, "MIT", "made up")
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry)
    offer_wheel(server, wheel_of(MODEL))
    return server


def offer_wheel(server: Server, wheel: bytes, sha256: str | None = None) -> None:
    fragment = sha256 or hashlib.sha256(wheel).hexdigest()
    page = f'<a href="../../files/tiny_model-0.9-py3-none-any.whl">old</a><a href="../../files/{WHEEL_NAME}#sha256={fragment}">w</a>'  # noqa: E501
    server.does.files |= {"/simple/tiny-model/": page.encode(), f"/files/{WHEEL_NAME}": wheel}


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.usefixtures("queries_pip")
def test_a_model_of_the_catalog(tiny: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run: llamaclust model pull tiny"):
        resolve_model("tiny", tmp_path)
    said: list[tuple[str, int, int | None]] = []
    path = pull_model("tiny", lambda *step: said.append(step), models_dir=tmp_path, limits=QUICK)
    assert path == tmp_path / "tiny" / "tiny.Q4_1.gguf"
    assert path.read_bytes() == MODEL
    assert left_behind(tmp_path) == ["tiny.Q4_1.gguf"]
    steps = dict.fromkeys(what for what, _, _ in said)
    assert list(steps) == ["searching the package index", "downloading", "unpacking and checking"]
    assert said[-1] == ("unpacking and checking", len(MODEL), len(MODEL))
    assert resolve_model("tiny", tmp_path) == path
    assert resolve_model(f"pypi:Tiny.Model==1.0/{MEMBER}", tmp_path) == path
    requests = tiny.does.requests
    assert pull_model("tiny", models_dir=tmp_path) == path
    assert tiny.does.requests == requests
    assert [model.name for model in stored_models(tmp_path)] == ["tiny"]
    remove_model("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="not downloaded"):
        remove_model("tiny", tmp_path)


def test_dropped_connections_are_gone_on_with(tiny: Server, tmp_path: Path) -> None:
    tiny.does.drop_after, tiny.does.drops = 70_000, 100
    assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL
    assert tiny.does.ranges_asked == [None, *(f"bytes={70_000 * part}-" for part in range(1, 5))]


def test_a_server_that_knows_no_ranges_is_asked_for_everything(tiny: Server, tmp_path: Path) -> None:
    tiny.does.drop_after, tiny.does.drops, tiny.does.ranges = 70_000, 2, False
    assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL
    assert tiny.does.requests == 3


def test_busy_servers_are_asked_again_and_others_not(tiny: Server, tmp_path: Path) -> None:
    url = f"{tiny.url}/files/{WHEEL_NAME}"
    tiny.does.fail_first = 2
    with httpx.Client() as client:
        fetch(client, Download(url, sha256=None), tmp_path / "a", lambda *_: None, QUICK)
        assert (tmp_path / "a").read_bytes() == wheel_of(MODEL)
        with pytest.raises(DownloadError, match="answered 404"):
            fetch(client, Download(f"{tiny.url}/none", sha256=None), tmp_path / "b", lambda *_: None, QUICK)
        tiny.does.fail_first = 99
        with pytest.raises(DownloadError, match=r"503 .*4 tries without progress"):
            fetch(client, Download(url, sha256=None), tmp_path / "c", lambda *_: None, QUICK)


def test_a_busy_index_is_asked_again(tiny: Server, tmp_path: Path) -> None:
    tiny.does.fail_first = 1
    assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL


@pytest.mark.usefixtures("queries_pip")
def test_settings_that_cannot_work_are_named(tiny: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PIP_CERT", str(tmp_path / "none.pem"))
        with pytest.raises(UsageError, match=r"none.pem: cannot read the certificates to trust: No such file"):
            pull_model("tiny", models_dir=tmp_path, limits=QUICK)
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy")
    with pytest.raises(UsageError, match="ALL_PROXY=nonsense://proxy is not the address of a proxy"):
        pull_model("tiny", models_dir=tmp_path, limits=QUICK)


def test_patience_ends_and_the_next_pull_goes_on(tiny: Server, tmp_path: Path) -> None:
    tiny.does.drop_after, tiny.does.drops = 0, 99
    wheel = tmp_path / "tiny" / f".{WHEEL_NAME}.part"
    wheel.parent.mkdir()
    wheel.write_bytes(wheel_of(MODEL)[:50_000])
    with pytest.raises(DownloadError, match=r"50000 bytes are kept\); run the same command again"):
        pull_model("tiny", models_dir=tmp_path, limits=QUICK)
    assert not locate("tiny", tmp_path).is_there  # type: ignore[union-attr]
    tiny.does.drops = 0
    assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL
    assert set(tiny.does.ranges_asked) == {"bytes=50000-"}


def test_a_kept_part_of_another_file_is_noticed(tiny: Server, tmp_path: Path) -> None:
    wheel = tmp_path / "tiny" / f".{WHEEL_NAME}.part"
    wheel.parent.mkdir()
    for kept in (b"x" * 50_000, b"x" * len(wheel_of(MODEL)), b"x" * (len(wheel_of(MODEL)) + 9)):
        wheel.write_bytes(kept)
        assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL
        remove_model("tiny", tmp_path)
        wheel.parent.mkdir()


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_web_file_without_a_hash_resumes_only_what_is_unchanged(
    server: Server, tmp_path: Path, etag: str | None
) -> None:
    server.does.files["/m.gguf"] = MODEL
    server.does.etag = etag
    server.does.drop_after, server.does.drops = 100_000, 99
    url = f"{server.url}/m.gguf"
    impatient = DownloadLimits(tries=1)
    with pytest.raises(DownloadError):
        pull_model(url, models_dir=tmp_path, limits=impatient)
    changed = b"GGUF" + MODEL[:3:-1]
    server.does.files["/m.gguf"], server.does.etag, server.does.drops = changed, etag and '"v2"', 0
    assert pull_model(url, models_dir=tmp_path, limits=impatient).read_bytes() == changed
    assert resolve_model(url, tmp_path).parent.name.startswith("web-127-0-0-1-")
    assert left_behind(tmp_path) == ["m.gguf"]


def test_a_web_file_with_a_wrong_hash_is_deleted(server: Server, tmp_path: Path) -> None:
    server.does.files["/m.gguf"] = MODEL
    with pytest.raises(DownloadError, match="SHA-256 is not"):
        pull_model(f"{server.url}/m.gguf#sha256={'0' * 64}", models_dir=tmp_path, limits=QUICK)
    assert left_behind(tmp_path) == []
    pull_model(f"{server.url}/m.gguf#sha256={MODEL_SHA256}", models_dir=tmp_path, limits=QUICK)
    assert left_behind(tmp_path) == ["m.gguf"]


def test_what_is_no_model_never_gets_its_name(server: Server, tmp_path: Path) -> None:
    server.does.files["/m.gguf"] = b"<!DOCTYPE html>please log in"
    with pytest.raises(ModelFileError, match=r"m\.gguf: not a GGUF file: a web page; the file was deleted"):
        pull_model(f"{server.url}/m.gguf", models_dir=tmp_path, limits=QUICK)
    assert left_behind(tmp_path) == []
    offer_wheel(server, wheel_of(b"no model"))
    with pytest.raises(ModelFileError, match="it begins with b'no m'"):
        pull_model(f"pypi:tiny-model==1.0/{MEMBER}", models_dir=tmp_path, limits=QUICK)
    assert stored_models(tmp_path) == []


@pytest.mark.parametrize(
    ("wheel", "sha256", "message"),
    [
        (wheel_of(MODEL), "0" * 64, "SHA-256 is not"),
        (wheel_of(MODEL[:-1] + b"!"), None, r"wrong bytes \(300000, SHA-256 .* the wheel was deleted"),
        (wheel_of(MODEL[:-1]), None, r"wrong bytes \(299999, "),
        (wheel_of(MODEL, "other.gguf"), None, f"has no file {MEMBER}"),
        (b"not a wheel", None, "is damaged"),
        (wheel_of(MODEL)[:-50_000], None, "is damaged"),
        (wheel_of(MODEL).replace(MODEL[1000:1010], b"0123456789"), None, "is damaged"),
    ],
)
def test_wrong_bytes_are_deleted_and_never_used(
    tiny: Server, tmp_path: Path, wheel: bytes, sha256: str | None, message: str
) -> None:
    offer_wheel(tiny, wheel, sha256)
    with pytest.raises(DownloadError, match=message) as caught:
        pull_model("tiny", models_dir=tmp_path, limits=QUICK)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []
    offer_wheel(tiny, wheel_of(MODEL))
    assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL


def test_no_wheel_of_that_version(tiny: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"no wheel of tiny-model==2\.0 found at http://127"):
        pull_model("pypi:tiny-model==2.0/x.gguf", models_dir=tmp_path, limits=QUICK)
    with pytest.raises(DownloadError, match="no wheel of unheard-of"):
        pull_model("pypi:unheard-of==2.0/x.gguf", models_dir=tmp_path, limits=QUICK)


def test_an_index_that_answers_in_json(tiny: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = '{"files": [{"filename": "w", "url": "/files/%s", "hashes": {"sha256": "%s"}}]}'
    wheel = wheel_of(MODEL)
    tiny.does.files["/simple/tiny-model/"] = (page % (WHEEL_NAME, hashlib.sha256(wheel).hexdigest().upper())).encode()
    send_header = Handler.send_header

    def as_json(self: Handler, name: str, value: str) -> None:
        send_header(self, name, "application/vnd.pypi.simple.v1+json" if value == "text/html" else value)

    monkeypatch.setattr(Handler, "send_header", as_json)
    assert pull_model("tiny", models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL
    remove_model("tiny", tmp_path)
    tiny.does.files["/simple/tiny-model/"] = (page % (WHEEL_NAME, "0")).encode()
    with pytest.raises(DownloadError, match="not 64 hex digits"):
        pull_model("tiny", models_dir=tmp_path, limits=QUICK)
    tiny.does.files["/simple/tiny-model/"] = b'{"files": [7]}'
    with pytest.raises(DownloadError, match="not an index page in JSON"):
        pull_model("tiny", models_dir=tmp_path, limits=QUICK)


@pytest.mark.usefixtures("queries_pip")
def test_wheels_in_a_folder_need_no_network(tiny: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / WHEEL_NAME).write_bytes(wheel_of(MODEL))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert pull_model("tiny", models_dir=tmp_path / "models", limits=QUICK).read_bytes() == MODEL
    assert (wheels / WHEEL_NAME).exists()
    assert tiny.does.requests == 0


@pytest.mark.parametrize("sha256", [hashlib.sha256(wheel_of(MODEL)).hexdigest(), "0" * 64])
def test_wheels_of_a_local_page_have_the_bytes_it_says(
    tiny: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str
) -> None:
    (tmp_path / WHEEL_NAME).write_bytes(wheel_of(MODEL))
    (tmp_path / "index.html").write_text(f'<a href="{WHEEL_NAME}#sha256={sha256}">w</a>')
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    if sha256 == "0" * 64:
        with pytest.raises(DownloadError, match=r"SHA-256 is .* the page that links to the wheel says 000"):
            pull_model("tiny", models_dir=tmp_path / "models", limits=QUICK)
        assert (tmp_path / WHEEL_NAME).exists()
    else:
        assert pull_model("tiny", models_dir=tmp_path / "models", limits=QUICK).read_bytes() == MODEL


def test_a_page_on_the_web_leads_to_no_file_of_this_machine(tiny: Server, tmp_path: Path) -> None:
    wheel = tmp_path / WHEEL_NAME
    wheel.write_bytes(wheel_of(MODEL))
    tiny.does.files["/simple/tiny-model/"] = f'<a href="{wheel.as_uri()}">w</a>'.encode()
    with pytest.raises(DownloadError, match="no wheel of Tiny"):
        pull_model("tiny", models_dir=tmp_path / "models", limits=QUICK)


def test_pips_own_settings_are_obeyed(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert pip_settings().index_urls == (f"{server.url}/simple",)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://mirror.invalid/a\nextra-index-url = file:///x\n  file:///y\ncert = /c\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.delenv("PIP_INDEX_URL")
    settings = pip_settings()
    assert settings.index_urls == ("https://mirror.invalid/a", "file:///x", "file:///y")
    assert settings.certificates == "/c"


def test_a_full_disk_is_noticed_first(tiny: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=download._DISK_RESERVE_BYTES + 400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"needs 64 MiB on the disk of .*, but 64 MiB are free"):
        pull_model("tiny", models_dir=tmp_path, limits=QUICK)
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.part"))


def test_a_models_directory_that_cannot_be_made(tiny: Server, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(DownloadError, match=r"(Not a directory|File exists); set LLAMACLUST_HOME to"):
        pull_model("tiny", models_dir=tmp_path / "models", limits=QUICK)


def test_two_pulls_at_once_download_once(tiny: Server, tmp_path: Path) -> None:
    tiny.does.bytes_per_s = 600_000
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(pull_model("tiny", models_dir=tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert tiny.does.requests == 1


def test_a_killed_pull_leaves_no_model_and_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.does.files["/m.gguf"] = MODEL
    server.does.bytes_per_s = 200_000
    url = f"{server.url}/m.gguf#sha256={MODEL_SHA256}"
    program = f"from pathlib import Path; from llamaclust.tools.hub.pull import pull_model; pull_model({url!r}, models_dir=Path({str(tmp_path)!r}))"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        deadline = time.monotonic() + 20
        while not any(path.stat().st_size > 20_000 for path in tmp_path.rglob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert stored_models(tmp_path) == []
    server.does.bytes_per_s = 0
    assert pull_model(url, models_dir=tmp_path, limits=QUICK).read_bytes() == MODEL
    assert server.does.ranges_asked[0] is None
    assert server.does.ranges_asked[1] not in (None, "bytes=0-")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tinny", "did you mean tiny?"),
        ("smollm", "did you mean smollm2-135m-instruct or "),
        ("/nowhere/m.gguf", "no such file"),
        ("/dev/null", "/dev/null: not a regular file; give the path of a .gguf file"),
        ("/dev", "/dev: the folder has no model (.gguf file); give the path of a .gguf file"),
        ("nowhere.gguf", "no such file"),
        ("hf:a/b", "must have the form hf:OWNER/NAME/FILE"),
        ("pypi:a/b", "must have the form pypi:PACKAGE==VERSION/FILE"),
        ("pypi:a==1/..", "must end in a file name"),
        ("http:///x", "names no host"),
        ("http://example.org/m.gguf", "use https, or add #sha256=HASH"),
        ("https://h/", "must end in a file name"),
        ("https://h/%2e%2e", "must end in a file name"),
        ("http://h/m.gguf#md5=1", "must be sha256="),
        ("file:///etc/passwd", "or the path of a local file"),
        ("ftp://host/m.gguf", "the address is not supported; give an https: address"),
        ("", "the model's name is empty"),
    ],
)
def test_specs_that_name_nothing(tiny: Server, tmp_path: Path, spec: str, message: str) -> None:
    for act in (resolve_model, lambda spec, where: pull_model(spec, models_dir=where)):
        with pytest.raises(UsageError) as caught:
            act(spec, tmp_path)
        assert message in str(caught.value)


def test_files_of_the_user_are_used_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "my model.gguf"
    path.write_bytes(b"GGUF")
    models = tmp_path / "models"
    assert resolve_model(str(path), models) == pull_model(str(path), models_dir=models) == path
    with pytest.raises(UsageError, match="delete it yourself"):
        remove_model(str(path), models)
    assert path.exists() and not models.exists()
