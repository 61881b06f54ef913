"""Tests of the replacement for `llama-server` that runs llama.cpp's tests, and of the client libraries' suites."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from support.clusters.served import until
from support.paths import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/suites/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look for their module here.
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Loads the replacement for llama-server. One model has its own substitute, and one file replaces all others."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/suites"))
    monkeypatch.setenv("LLAMACLUST_SUITE_MODEL", "/models/a.gguf")
    monkeypatch.setenv("LLAMACLUST_SUITE_STAND_INS", str(tmp_path))
    (tmp_path / "encoder.gguf").touch()
    return script("llama_server")


def read(module: ModuleType, command: list[str], folder: Path) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(json.dumps(module.cluster_file(module.read_flags(command), folder)))
    return load_config(path)


def test_flags_become_a_cluster_file(tmp_path: Path, stand_in: ModuleType) -> None:
    command = "--port 8080 --temp 0.8 --seed 42 --ctx-size 512 --parallel 2 --no-slots --api-key sk-one-key --alias a,b"
    words = [*command.split(), "--hf-repo", "x/y", "--reasoning", "off", "--chat-template", "llama3"]
    config = read(stand_in, words, tmp_path)
    assert config.model == "/models/a.gguf"
    assert (config.context_length, config.max_sequences, config.port) == (256, 2, 8080)
    assert config.api.defaults["seed"] == 42 and config.api.aliases == ("a", "b")
    assert config.api.model_name == "a" and config.api.disabled == ("metrics", "slots")
    assert config.api.defaults["chat_template_kwargs"] == {"enable_thinking": False}
    assert config.api_keys_file is not None and config.api_keys_file.stat().st_mode & 0o777 == 0o600


def test_stand_ins_replace_models_for_both_servers(tmp_path: Path, stand_in: ModuleType) -> None:
    command = ["--hf-repo", "ggml-org/models", "--hf-file", "encoder/f16.gguf", "--pooling", "last"]
    encoder = str(tmp_path / "encoder.gguf")
    assert read(stand_in, command, tmp_path).model == encoder
    assert stand_in.own_models(command, tmp_path) == ["--pooling", "last", "--model", encoder]


def test_an_adapter_has_a_model_of_its_own(tmp_path: Path, stand_in: ModuleType) -> None:
    command = ["--hf-repo", "ggml-org/stories15M_MOE", "--lora", "tmp/moe_shakespeare15M.gguf"]
    config = read(stand_in, command, tmp_path)
    assert config.model == str(tmp_path / "adapted.gguf")
    assert [adapter.path for adapter in config.adapters] == [tmp_path / "adapter.gguf"]


def test_a_server_without_a_model_has_several_behind_it(tmp_path: Path, stand_in: ModuleType) -> None:
    routed = [model.name for model in read(stand_in, ["--models-max", "2"], tmp_path).models]
    assert "ggml-org/tinygemma3-GGUF:Q8_0" in routed and len(routed) == 3
    preset = Path(stand_in.own_models(["--models-max", "2"], tmp_path)[-1]).read_text()
    assert "[ggml-org/tinygemma3-GGUF:Q8_0]\nmodel = /models/a.gguf\n" in preset
    assert all(f"[{name}]\n" in preset for name in routed)


def test_results_of_two_servers_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/suites"))
    module = script("results")
    failed = '<testcase classname="unit.test_a" name="two"><failure message="no"/></testcase>'
    cases = {"one": failed, "other": failed.replace('<failure message="no"/>', "")}
    for server, case in cases.items():
        folder = tmp_path / server
        folder.mkdir()
        (folder / "a.xml").write_text(f'<testsuite><testcase classname="unit.test_a" name="one"/>{case}</testsuite>')
    module.print_comparison({server: module.outcomes(tmp_path / server) for server in (*cases, "none")})
    shown = capsys.readouterr().out
    assert "| a | 1 of 2 | 2 of 2 |  |" in shown and "| sum | 1 | 2 | 0 |" in shown
    assert shown.endswith("\none fails test_a::two\n")


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Loads the module, with the script `command` in the folder in place of every suite's tests."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/suites"))
    module = script("clients")
    monkeypatch.setattr(module, "install", lambda name, suite: tmp_path)
    command = ["sh", str(tmp_path / "command")]
    monkeypatch.setattr(module, "_command", lambda suite, folder, report, *_: [*command, str(report)])
    return module


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sleep 600 & echo $! > PLACE/pid; mv PLACE/pid PLACE/child; wait", "did not end within 5 s"),
        (': > "$1"', "did not run to their end"),
    ],
)
async def test_a_suite_that_hangs_or_crashes_fails_alone(
    command: str, reason: str, tmp_path: Path, clients: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "command").write_text(command.replace("PLACE", str(tmp_path)))
    with pytest.raises(clients.Skipped, match=reason):
        target = clients.Target("http://127.0.0.1:1", "m", limit_s=5 if "sleep" in command else 60)
        await clients.run("ollama", clients.SUITES["ollama"], target)
    if "sleep" in command:
        child = int((tmp_path / "child").read_text())
        await until(lambda: has_ended(child))


async def test_a_suite_gets_no_secrets(tmp_path: Path, clients: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    case = '<testsuite><testcase classname="a" name="b"/></testsuite>'
    (tmp_path / "command").write_text(f"""echo "$HF_TOKEN$SUITE_MODEL" > {tmp_path}/seen; echo '{case}' > "$1" """)
    counts = await clients.run("ollama", clients.SUITES["ollama"], clients.Target("http://127.0.0.1:1", "m"))
    assert (counts, (tmp_path / "seen").read_text()) == ({"passed": 1}, "m\n")


async def test_a_suite_of_a_repository_needs_a_checkout(
    tmp_path: Path, clients: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, target = "open-responses", clients.Target("http://127.0.0.1:1", "m")
    with pytest.raises(clients.Skipped, match="a checkout of openresponses/openresponses"):
        await clients.run(name, clients.SUITES[name], target)
    assert target.variables(name).keys() == {"SUITE_API", "SUITE_MODEL"}
    target = clients.Target("http://127.0.0.1:1", "m", {name: tmp_path})
    assert target.variables(name)["SUITE_CHECKOUT"] == str(tmp_path)


@pytest.mark.parametrize("name", ["generating", "ranking", "seeing"])
def test_suites_have_models_of_their_own(name: str, tmp_path: Path, clients: ModuleType) -> None:
    model, keys = clients.build_stand_in(name, tmp_path)
    file = {"name": "a", "model": str(model), "listen": "127.0.0.1:0", "workers": [{"name": "w"}], **keys}
    (tmp_path / "cluster.yaml").write_text(json.dumps(file))
    config = load_config(tmp_path / "cluster.yaml")
    assert all(Path(adapter.path).is_file() for adapter in config.adapters) and model.is_file()


def test_operations_are_those_of_the_server_or_of_a_checkout(tmp_path: Path, clients: ModuleType) -> None:
    own, ollama = (clients.SUITES[name].document for name in ("schemathesis", "ollama-document"))
    api = "http://127.0.0.1:1"
    assert [*own.words(api, None, 7)][1:5] == [f"{api}/openapi.json", f"--url={api}", "--seed=1", "--max-examples=7"]
    assert [*ollama.words(api, tmp_path, 7)][1] == str(tmp_path / "docs" / "openapi.yaml")
