"""A pytest plugin for llama.cpp's server tests. It replaces downloaded models by small ones (`llamacpp_models.py`) and
downloaded images by random ones. Consecutive tests with the same flags share a server."""

from __future__ import annotations

import io
import os
import shutil
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import requests
from llamacpp_models import adapter, model_of
from PIL import Image


def _download(url: str, out: str) -> None:
    model = model_of({"--hf-file": url})
    source = adapter() if "lora" in url.lower() or "shakespeare" in url or model is None else model
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, out)


sys.modules.setdefault("wget", types.SimpleNamespace(download=_download))  # type: ignore[arg-type]
_IMAGES = "https://huggingface.co/ggml-org/tinygemma3-GGUF/resolve/main/test/"
_get = requests.get


def _get_image(url: str, *arguments: Any, **options: Any) -> Any:
    if not url.startswith(_IMAGES):
        return _get(url, *arguments, **options)
    pixels = np.random.default_rng(zlib.crc32(url.encode())).integers(0, 256, (32, 32, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return types.SimpleNamespace(content=out.getvalue(), raise_for_status=lambda: None)


requests.get = _get_image  # type: ignore[assignment]
_KEPT: dict[str, Any] = {}
"""`server` is the tests' running ServerProcess, `flags` are its flags, and `stop` is its original method."""


def pytest_collection_finish(session: object) -> None:
    import utils  # type: ignore[import-not-found]  # A module of the tests.

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    start, stop = utils.ServerProcess.start, utils.ServerProcess.stop

    def start_or_keep(server: Any, *arguments: Any, **options: Any) -> None:
        flags = {name: value for name, value in vars(server).items() if name not in ("process", "_log")}
        kept = _KEPT.get("server")
        if kept is not None and _KEPT["flags"] == flags and kept.process.poll() is None:
            server.process = kept.process
            return
        pytest_sessionfinish()
        log = Path(os.environ["LLAMACLUST_SUITE_FOLDER"]) / "server.log"
        server.log_path = server.log_path or str(log)
        try:
            start(server, *arguments, **options)
        except Exception as error:
            stop(server)
            raise RuntimeError(f"{error}: {_last_lines(Path(server.log_path))}") from error
        _KEPT.update(server=server, flags=flags, stop=stop)

    utils.ServerProcess.start = start_or_keep
    utils.ServerProcess.stop = lambda server: None


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-4:])


def pytest_sessionfinish() -> None:
    if "server" in _KEPT:
        _KEPT["stop"](_KEPT["server"])
        _KEPT.clear()
