"""The stand-in for `llama-server` that runs llama.cpp's own tests against llamaclust."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import load_config
from support.paths import ROOT


def test_flags_become_a_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("llama_server", ROOT / "benchmarks/suites/llama_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("LLAMACLUST_SUITE_MODEL", "/models/a.gguf")
    command = "--port 8080 --temp 0.8 --seed 42 --ctx-size 512 --parallel 2 --no-slots --api-key sk-one-key --alias a,b"
    flags = module.read_flags([*command.split(), "--reasoning", "off", "--chat-template", "llama3"])
    path = tmp_path / "cluster.yaml"
    path.write_text(str(module.cluster_file(flags, tmp_path)).replace("True", "true").replace("False", "false"))
    config = load_config(path)
    assert (config.context_length, config.max_sequences, config.port) == (256, 2, 8080)
    assert config.api.defaults["seed"] == 42 and config.api.aliases == ("a", "b")
    assert config.api.model_name == "a" and config.api.disabled == ("metrics", "slots")
    assert config.api.defaults["chat_template_kwargs"] == {"enable_thinking": False}
    assert config.api_keys_file is not None and config.api_keys_file.stat().st_mode & 0o777 == 0o600
