"""The stand-in for `llama-server` that runs llama.cpp's own tests against llamaclust; suites of client libraries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from llamaclust.cluster.config.cluster_config import load_config
from support.clusters.served import until
from support.paths import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/suites/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_flags_become_a_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("llama_server")
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


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Whose suites' tests are what `command` in the folder has."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/suites"))
    module = script("clients")
    monkeypatch.setattr(module, "install", lambda name, suite: tmp_path)
    command = ["sh", str(tmp_path / "command")]
    monkeypatch.setattr(module, "_command", lambda suite, folder, report: [*command, str(report)])
    return module


@pytest.mark.parametrize(
    ("command", "reason"),
    [("sleep 600 & echo $! > PLACE/child; wait", "did not end within 1 s"), (': > "$1"', "did not run to their end")],
)
async def test_a_suite_that_hangs_or_crashes_fails_alone(
    command: str, reason: str, tmp_path: Path, clients: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_RUN_S", 1)
    (tmp_path / "command").write_text(command.replace("PLACE", str(tmp_path)))
    with pytest.raises(clients.Skipped, match=reason):
        await clients.run("ollama", clients.SUITES["ollama"], "http://127.0.0.1:1", "m")
    if (tmp_path / "child").exists():
        child = int((tmp_path / "child").read_text())
        await until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


async def test_a_suite_gets_no_secrets(tmp_path: Path, clients: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    case = '<testsuite><testcase classname="a" name="b"/></testsuite>'
    (tmp_path / "command").write_text(f"""echo "$HF_TOKEN$SUITE_MODEL" > {tmp_path}/seen; echo '{case}' > "$1" """)
    counts = await clients.run("ollama", clients.SUITES["ollama"], "http://127.0.0.1:1", "m")
    assert (counts, (tmp_path / "seen").read_text()) == ({"passed": 1}, "m\n")
