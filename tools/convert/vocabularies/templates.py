"""Reads the chat templates of a checkpoint's folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.core.regular_file import decode_text
from llamaclust.model.checkpoints.json_file import read_json

DEFAULT: Final = "default"
MORE_TEMPLATES: Final = "additional_chat_templates"
_NAME: Final = re.compile("[A-Za-z0-9_]{1,64}")
_MAX_BYTES: Final = 1 << 22


def read_templates(folder: Path, stated: dict[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name. Files take precedence over those `stated` in tokenizer_config.json. Leaves
    out templates with names that are invalid in GGUF. Raises ModelFileError if a file cannot be read."""
    found = _variants(stated.get("chat_template") or _in_json(folder / "chat_template.json"))
    for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        found[path.stem] = _read(path)
    default = folder / "chat_template.jinja"
    if default.is_file():
        found[DEFAULT] = _read(default)
    return {name: text for name, text in found.items() if _NAME.fullmatch(name)}


def _variants(stated: object) -> dict[str, str]:
    """Returns templates by name. `stated` is one template or a list of named templates."""
    listed = stated if isinstance(stated, list) else [{"name": DEFAULT, "template": stated}]
    pairs = [(entry.get("name"), entry.get("template")) for entry in listed if isinstance(entry, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _in_json(path: Path) -> object:
    return read_json(path).get("chat_template") if path.is_file() else None


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ModelFileError(f"{path}: the template has {size >> 20} MiB; the limit is {_MAX_BYTES >> 20} MiB")
        return decode_text(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None
