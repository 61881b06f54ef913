"""Makes relative paths in a cluster file absolute. They are relative to the cluster file's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llamaclust.cluster.config.document import Document
from llamaclust.cluster.config.model_sources import REMOTE_PREFIXES
from llamaclust.model.chat.template_choice import built_in_names

_PATHS = (
    ("join", "trust_dir"),
    ("lease", "account"),
    ("api", "adapter_folder"),
    ("api", "slot_folder"),
    ("listen_tls", "certificate"),
    ("listen_tls", "key"),
    ("telemetry", "headers_file"),
)


def anchored(document: Document, folder: Path) -> Document:
    values = dict(document.values)
    _anchor_model(values, folder)
    if isinstance(models := values.get("models"), list):
        values["models"] = [dict(entry) if isinstance(entry, dict) else entry for entry in models]
        for entry in values["models"]:
            if isinstance(entry, dict):
                _anchor_model(entry, folder)
    if isinstance(speculative := values.get("speculative"), dict):
        values["speculative"] = dict(speculative)
        _anchor_file(values["speculative"], "model", folder)
    for key in ("api_keys_file", "state_dir"):
        _anchor(values, key, folder)
    for section, key in _PATHS:
        if isinstance(values.get(section), dict):
            values[section] = dict(values[section])
            _anchor(values[section], key, folder)
    return replace(document, values=values)


def _anchor_model(values: dict[str, Any], folder: Path) -> None:
    for key in ("model", "mmproj"):
        _anchor_file(values, key, folder)
    if values.get("chat_template") not in built_in_names():
        _anchor(values, "chat_template", folder)
    if isinstance(adapters := values.get("adapters"), list):
        values["adapters"] = [dict(adapter) if isinstance(adapter, dict) else adapter for adapter in adapters]
        for adapter in filter(lambda adapter: isinstance(adapter, dict), values["adapters"]):
            _anchor(adapter, "path", folder)


def _anchor_file(values: dict[str, Any], key: str, folder: Path) -> None:
    file = values.get(key)
    if isinstance(file, str) and file.endswith(".gguf") and not file.startswith(REMOTE_PREFIXES):
        _anchor(values, key, folder)


def _anchor(values: dict[str, Any], key: str, folder: Path) -> None:
    path = values.get(key)
    if isinstance(path, str) and path:
        values[key] = path if path.startswith("~") else str(folder / path)
