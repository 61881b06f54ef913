"""Determines what to run from the command line: a cluster file, a model for workers on this machine, or the demo."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path

from llamaclust.core.errors import UsageError

MAX_WORKERS = len(string.ascii_lowercase)
_FILES = frozenset({".yaml", ".yml", ".json"})
_MAX_NAME = 63


def cluster_source(
    source: str | None, workers: int | None, overrides: Sequence[str], *, discover: bool = False
) -> tuple[Path | None, list[str]]:
    """Returns the path of the cluster file (None without a file) and KEY=VALUE overrides. Raises UsageError if a model
    is neither a file nor a known name, or if --workers is given with a cluster file."""
    if source is not None and not _is_model(source):
        if workers is not None:
            raise UsageError(
                f"--workers: the cluster file {source} lists its workers; give a model instead of the file"
            )
        return Path(source), [*(["join.discover=true"] if discover else []), *overrides]
    count = workers or 1
    if discover:
        places = ["launcher=static", "join.discover=true", f"workers={count}", _objective(count)]
    else:
        places = [] if source is None and workers is None else [_local_workers(count), _objective(count)]
    return None, [*([] if source is None else _served(source)), *places, *overrides]


def _is_model(source: str) -> bool:
    if _has_model_form(source) or _is_folder(source) or _is_gguf(source):
        return True
    return "/" not in source and Path(source).suffix not in _FILES and not _is_there(Path(source))


def _is_folder(source: str) -> bool:
    return source != "" and _is_there(Path(source)) and Path(source).is_dir()


def _is_gguf(source: str) -> bool:
    """Returns True for a model file, whatever its name is. Ollama's files have no ending."""
    try:
        if not Path(source).is_file():  # A pipe can be read only once.
            return False
        from llamaclust.model.gguf.header import MAGIC

        with Path(source).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # The name is too long or contains a null character.
        return False


def _has_model_form(source: str) -> bool:
    return source.startswith(_remote_prefixes()) or source.lower().endswith(".gguf")


def _remote_prefixes() -> tuple[str, ...]:
    from llamaclust.cluster.config.model_sources import REMOTE_PREFIXES

    return REMOTE_PREFIXES


def _served(spec: str) -> list[str]:
    from llamaclust.cluster.config.catalog import WantedFile, locate

    found = locate(spec)
    path = found.path if isinstance(found, WantedFile) else found
    model = spec if isinstance(found, WantedFile) else _text_of(found.absolute())
    name = path.stem if _has_model_form(spec) or _is_folder(spec) or _is_gguf(spec) else spec
    return [f"name={_cluster_name(name)}", f"model={json.dumps(model)}"]


def mmproj_override(choice: str | None) -> list[str]:
    if choice is None:
        return []
    is_path = (choice.endswith(".gguf") or _is_gguf(choice)) and not choice.startswith(_remote_prefixes())
    return [f"mmproj={json.dumps(_text_of(Path(choice).expanduser().absolute()) if is_path else choice)}"]


def _text_of(path: Path) -> str:
    """Returns a path for a cluster file. Raises UsageError if the path is not UTF-8, which cluster files must be."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: the path is not UTF-8: rename the file, or give a link to it") from None
    return str(path)


def _cluster_name(text: str) -> str:
    name = re.sub(r"[^a-z0-9_.-]+", "-", text.lower(), flags=re.ASCII)[:_MAX_NAME].strip("_.-")
    return json.dumps(name or "default")


def _local_workers(count: int) -> str:
    return f"workers={json.dumps([{'name': name} for name in string.ascii_lowercase[:count]])}"


def _objective(workers: int) -> str:
    """Returns the override that makes plans use all workers. Plans for `latency` often use only one worker."""
    return f"objective={'latency' if workers == 1 else 'throughput'}"
