from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.config.cluster_config import ClusterConfig, json_schema, load_config
from llamaclust.cluster.config.document import read_document
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.values import parse_duration, parse_size
from llamaclust.core.addresses import is_loopback, split_address
from llamaclust.core.errors import UsageError
from support.paths import ROOT

CONTRACT = """
name: home
model: smollm2-135m-instruct
context_length: 4096
launcher: local
listen: 127.0.0.1:8080
workers:
  - name: a
    device: cpu
    threads: 2
    memory: 8GiB
  - name: b
plan: auto
objective: latency
wire: f32
kv_type: f16
kv_memory: auto
max_sequences: 32
api_keys_file: null
state_dir: ~/.local/state/llamaclust
timeouts: {request: 600s, worker: 5s, recovery: 120s, coordinator: 10min}
"""
SMALL = "model: m\nworkers: [{name: a}, {name: b}]\n"


def load(folder: Path, text: str, *overrides: str) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def failure(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder / "cluster.yaml"), "FILE")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("auto", (32, 0)),
        ("true", (32, 0)),
        ("{}", (32, 0)),
        ("{max_window: 4, shared_answers: 4096}", (4, 4096)),
        ("off", None),
        ("'off'", None),
        ("'on'", (32, 0)),
        ("'true'", (32, 0)),
        ("'false'", None),
        ("false", None),
    ],
)
def test_speculation_is_on_or_off_or_has_keys(tmp_path: Path, text: str, found: tuple[int, int] | None) -> None:
    own = load(tmp_path, SMALL, f"speculative={text}").speculative
    assert (own and (own.max_window, own.shared_answers)) == found
    assert load(tmp_path, SMALL).speculative == load(tmp_path, SMALL, "speculative=auto").speculative


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[{name: a, kv_disk: 1GiB}, {name: b}]", "is for all workers or none"),
        ("[{name: a, kv_disk: 1GiB, device: cuda}]", "is for device cpu, but this worker has cuda:0"),
        ("[{name: a, kv_disk: 1GiB}]\nprefix_cache: false", "needs `prefix_cache`, which is off"),
        ("[{name: a, kv_disk: 4GiB}]\nlauncher: static", "llamaclust worker ... --kv-disk 4GiB"),
    ],
)
def test_kv_memory_on_disk_is_refused_where_it_would_not_be_used(tmp_path: Path, text: str, why: str) -> None:
    found = failure(tmp_path, f"model: m\nworkers: {text}\n")
    assert "kv_disk" in found
    assert why in found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[{name: a, numa_node: 1}]\nlauncher: static", "llamaclust worker ... --numa-node 1"),
        ("[{name: a, mlock: true}]\nlauncher: static", "llamaclust worker ... --mlock"),
        ("[{name: a, mlock: false}]\nlauncher: static", "llamaclust worker ... without --mlock"),
        ("[{name: a, numa_node: 1}]\nlauncher: mpi", "start mpirun with --map-by numa --bind-to numa"),
        ("[{name: a, numa_node: -1}]", "numa_node"),
        ("[{name: a, mlock: 3}]", "mlock"),
    ],
)
def test_memory_of_workers_is_placed_where_they_are_started(tmp_path: Path, text: str, why: str) -> None:
    assert why in failure(tmp_path, f"model: m\nworkers: {text}\n")


@pytest.mark.parametrize(
    ("api", "why"),
    [
        ("{model_name: m}", "give `name` and `aliases` in the entries of `models`"),
        ("{aliases: [m]}", "give `name` and `aliases` in the entries of `models`"),
        ("{strict_model: false}", "a request may name any model or none"),
        ("{strict_model: true}", "a request may name any model or none"),
        ("{tags: [chat]}", "cannot be set with `models`; remove this key"),
        ("{pull: true}", "use `llamaclust model pull`"),
    ],
)
def test_settings_of_one_model_are_refused_beside_several(tmp_path: Path, api: str, why: str) -> None:
    several = "models: [{model: m}, {model: n}]\nworkers: [{name: a}]\n"
    found = failure(tmp_path, f"{several}api: {api}\n")
    assert f"api.{api[1:].partition(':')[0]}" in found and "cannot be set with `models`" in found and why in found
    assert load(tmp_path, f"{several}api: {{strict_model: auto, prefix: /llm}}\n").api.strict_model is None


def test_each_of_several_models_may_have_adapters_and_a_plan(tmp_path: Path) -> None:
    entries = ("{model: m, plan: [{worker: a, layers: [0, 4]}]}", "{model: n, adapters: [{name: x, path: x.gguf}]}")
    text = "models:\n" + "".join(f"- {entry}\n" for entry in entries)
    first, second = load(tmp_path, f"{text}workers: [{{name: a}}]\n").of_each_model()
    assert first.plan is not None and first.plan[0].layers == (0, 4) and not first.adapters
    assert second.plan is None and [adapter.name for adapter in second.adapters] == ["x"]
    for line, workers, why in (
        (
            "adapters: [{name: x, path: x.gguf}]",
            "name: a",
            "adapters: cannot be set with `models`; give `adapters` in the entries of `models`",
        ),
        (
            "plan: [{worker: a, layers: [0, 4]}]",
            "name: a",
            "plan: cannot be set with `models`; give `plan` in the entries of `models`",
        ),
        ("", "name: b", "models[0].plan[0].worker: unknown worker 'a'"),
        ("", "name: a, device: cuda", "models[1].adapters: run on CPUs only"),
        ("- {model: x}", "name: a", "two models or adapters are named 'x'"),
    ):
        file = f"{text}{line}\nworkers: [{{{workers}}}]\n"
        assert why in failure(tmp_path, file)


def test_workers_with_gpus(tmp_path: Path) -> None:
    text = "model: m\nworkers:\n- {name: a, device: cuda, gpu_layers: 20, gpu_memory: 4GiB}\n"
    config = load(
        tmp_path, text + "- {name: b, device: [cuda:1, cuda:3], gpu_layers: auto}\n- {name: c, device: cpu}\n"
    )
    assert [one.device for one in config.workers] == ["cuda:0", "cuda:1,cuda:3", "cpu"]
    assert [one.gpu_layers for one in config.workers] == [20, None, None]
    assert config.workers[0].gpu_memory == 4 << 30 and config.workers[1].gpu_memory is None
    again = load(tmp_path, "model: m\nworkers: [{name: a, device: 'cuda:1,cuda:3'}]\n")
    assert again.workers[0].device == "cuda:1,cuda:3"
    assert "measures itself" in failure(
        tmp_path, text + "- {name: b, device: cuda, memory_bandwidth_gb_s: 3, int8_gmac_s: 4}\n"
    )


def test_the_whole_contract_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, CONTRACT)
    assert (config.name, config.host, config.port, config.context_length) == ("home", "127.0.0.1", 8080, 4096)
    assert [worker.name for worker in config.workers] == ["a", "b"]
    assert (config.workers[0].memory, config.workers[0].threads, config.workers[1].memory) == (8 << 30, 2, None)
    assert config.plan is None and config.kv_memory is None and config.prefill_chunk is None
    assert config.timeouts.coordinator == 600.0 and config.timeouts.worker == 5.0
    assert config.state_dir == Path.home() / ".local/state/llamaclust"


def test_plan_by_hand_sizes_and_measurements(tmp_path: Path) -> None:
    plan = "plan: [{worker: a, layers: [0, 12]}, {worker: b, layers: [12, 30]}]\nkv_memory: 512MiB\n"
    config = load(tmp_path, SMALL + plan, "workers.b.memory_bandwidth_gb_s=40", "workers.b.int8_gmac_s=900.5")
    assert config.plan is not None
    assert [(entry.worker, entry.layers) for entry in config.plan] == [("a", (0, 12)), ("b", (12, 30))]
    assert config.kv_memory == 512 << 20
    assert (config.workers[1].memory_bandwidth_gb_s, config.workers[1].int8_gmac_s) == (40, 900.5)


def test_demo_cluster() -> None:
    config = load_config(None)
    assert (config.model, [worker.name for worker in config.workers]) == ("smollm2-135m-instruct", ["a", "b"])


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the cluster file: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        load_config(tmp_path / "model.gguf")


def test_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL, "timeouts.request=90s", "workers.b.threads=1", "listen='[::1]:0'", "prefill_chunk=7")
    assert (config.timeouts.request, config.workers[1].threads, config.prefill_chunk) == (90.0, 1, 7)
    assert (config.host, config.port) == ("::1", 0)
    assert "unknown key 'thread' in workers[1]" in failure(tmp_path, SMALL, "workers.b.thread=1")
    assert "there is no item 'c'; the items are a, b" in failure(tmp_path, SMALL, "workers.c.threads=1")
    assert "must be KEY=VALUE" in failure(tmp_path, SMALL, "listen")
    assert "has no keys to set" in failure(tmp_path, SMALL, "model.file=1")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "model: files/m.gguf\napi_keys_file: keys\nworkers: [{name: a}]\n")
    assert (config.model, config.api_keys_file) == (str(tmp_path / "files/m.gguf"), tmp_path / "keys")
    for model in ("hf:a/b/m.gguf", "pypi:a==1/m.gguf", "https://example.org/m.gguf", "http://[::1]:80/m.gguf"):
        assert load(tmp_path, f"model: '{model}'\nworkers: [{{name: a}}]\n").model == model


def test_tls_of_the_api(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL).listen_tls is None
    own = load(tmp_path, SMALL + "listen_tls: self-signed\n").listen_tls
    assert own is not None and own.certificate is own.key is None
    given = load(tmp_path, SMALL + "listen_tls: {certificate: tls.crt, key: /keys/tls.key}\n").listen_tls
    assert given is not None and (given.certificate, given.key) == (tmp_path / "tls.crt", Path("/keys/tls.key"))
    assert load(tmp_path, SMALL, "listen_tls=self-signed").listen_tls == own


def test_origins_are_written_as_browsers_send_them(tmp_path: Path) -> None:
    given = "['https://Chat.Example/', 'http://a:80', 'https://a:443', 'http://[::1]:3000', app://notes, 'null', '*']"
    read = ("https://chat.example", "http://a", "https://a", "http://[::1]:3000", "app://notes", "null", "*")
    assert load(tmp_path, f"{SMALL}allowed_origins: {given}\n").allowed_origins == read


def test_environment() -> None:
    read = environment({"LLAMACLUST_STATE_DIR": "/s", "XDG_CACHE_HOME": "/c", "LLAMACLUST_FEATURE_LEVEL": "avx2"})
    assert (read.state_dir, read.home, read.feature_level) == (Path("/s"), Path("/c/llamaclust"), "avx2")
    assert environment({"LLAMACLUST_JOIN": "a:1,b:2,"}).join == ("a:1", "b:2") and environment({}).join == ()
    assert environment({}).home == Path.home() / ".cache/llamaclust"
    assert (environment({}).packed_cache_bytes, environment({"LLAMACLUST_CACHE_SIZE": "0"}).packed_cache_bytes) == (
        32 << 30,
        0,
    )
    assert environment({"LLAMACLUST_CACHE_SIZE": "3MiB", "LLAMACLUST_HOME": "/h"}).packed_cache_dir == Path("/h/packed")
    assert environment({"LLAMACLUST_CACHE_SIZE": "4194304"}).packed_cache_bytes == 4 << 20
    with pytest.raises(UsageError, match="LLAMACLUST_CACHE_SIZE=32 has no unit: write 32GiB, 32MiB, or at least"):
        environment({"LLAMACLUST_CACHE_SIZE": "32"})
    for digits in ("\uff14\uff10GiB", "\uff14"):  # full-width digits
        with pytest.raises(UsageError, match="is not a size"):
            environment({"LLAMACLUST_CACHE_SIZE": digits})
    assert (environment({}).weights_bytes, environment({"LLAMACLUST_WEIGHTS_SIZE": "0"}).weights_bytes) == (64 << 30, 0)
    with pytest.raises(UsageError, match="LLAMACLUST_CACHE_SIZE='much' is not a size; write it like 8GiB"):
        environment({"LLAMACLUST_CACHE_SIZE": "much"})
    with pytest.raises(UsageError, match="LLAMACLUST_FEATURE_LEVEL=avx3 is not supported; set one of generic"):
        environment({"LLAMACLUST_FEATURE_LEVEL": "avx3"})
    with pytest.raises(
        UsageError, match="LLAMACLUST_HOME='~no-such-user' begins with a home directory that does not exist"
    ):
        environment({"LLAMACLUST_HOME": "~no-such-user"})


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def expand(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expand)
    with pytest.raises(UsageError, match="has no home directory, and HOME is not set; set LLAMACLUST_STATE_DIR to a"):
        environment({})
    with pytest.raises(UsageError, match="set LLAMACLUST_HOME to a folder"):
        environment({"LLAMACLUST_STATE_DIR": "/s"})
    assert environment({"LLAMACLUST_STATE_DIR": "/s", "LLAMACLUST_HOME": "/h"}).home == Path("/h")


def test_values() -> None:
    sizes = ("1B", "2kB", "1.5 MiB", "3GB", 1 << 20, "1048576", "24G", "24Gi", "24GiB", "500M")
    read = [1, 2000, 3 << 19, 3 * 10**9, 1 << 20, 1 << 20, 24 * 10**9, 24 << 30, 24 << 30, 500 * 10**6]
    assert [parse_size(text) for text in sizes] == read
    for bad in (24, "24", 24.5, (1 << 20) - 1):
        with pytest.raises(ValueError, match=f"^{bad} has no unit: write {bad}GiB, {bad}MiB, or"):
            parse_size(bad)
    assert [parse_duration(text) for text in ("250ms", "1.5h", "10min", 3)] == [0.25, 5400.0, 600.0, 3.0]
    assert split_address("[::1]:80") == ("::1", 80)
    assert [is_loopback(host) for host in ("127.3.2.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    bad_sizes: tuple[Any, ...] = (
        "0B",
        "-1GiB",
        "8",
        "nan",
        "1e3GiB",
        True,
        None,
        "9999999TiB",
        ["1GiB"],
        0,
        -1,
        1e12,
        "24gib",
    )
    for size in bad_sizes:
        with pytest.raises(ValueError):
            parse_size(size)
    bad_durations: tuple[Any, ...] = ("0s", "5", "-1s", "infs", float("nan"), float("inf"), True, None, "99999h")
    for duration in bad_durations:
        with pytest.raises(ValueError):
            parse_duration(duration)
    for bad in ("a", "a:b", ":80", "::1:80", "h:99999"):
        with pytest.raises(ValueError):
            split_address(bad)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_config_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes((SMALL + text).encode("utf-8", "surrogatepass"))
    try:
        load_config(path)
    except UsageError as error:
        assert "\n" not in str(error)


def test_schema_file_is_current() -> None:
    current = ROOT / "deploy/cluster.schema.json"
    assert current.read_text() == json_schema(), (
        "run: python -m llamaclust.cluster.config.cluster_config > deploy/cluster.schema.json"
    )


def test_a_silence_too_short_to_tell_a_lost_worker_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL, "timeouts.worker=500ms").timeouts.worker == 0.5
    assert "--set timeouts.worker=400ms: timeouts.worker: 0.4 s is too short" in failure(
        tmp_path, SMALL, "timeouts.worker=400ms"
    )


@pytest.mark.parametrize("text", ["\U0001f999", "a\U00020bb7b\U0010ffff", "\U0001f1e9\U0001f1ea/x"])
def test_characters_of_json_above_u_ffff(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"name": "x", text: text}))
    assert read_document(path).values == {"name": "x", text: text}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("m:latest", ""),
        ("org/m:latest", "api: {model_name: org/m}"),
        ("poet", "api: {aliases: ['poet:latest']}"),
        ("poet:latest", "api: {aliases: [poet]}"),
        ("m", "api: {model_name: 'm:latest'}"),
    ],
)
def test_names_that_are_one_for_clients_of_ollama(tmp_path: Path, name: str, others: str) -> None:
    text = f"model: m.gguf\nworkers: [{{name: a}}]\n{others}\nadapters: [{{name: '%s', path: a.gguf}}]\n"
    assert "is also the name of another adapter or of the model" in failure(tmp_path, text % name)
    load(tmp_path, text % "m:v2")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("m", "m"),
        ("a/m.gguf", "m"),
        ("a/m.GGUF", "m"),
        ("hf:a/b/q4/m.gguf", "m"),
        ("hf:a/b/m.gguf@main", "m"),
        ("https://a.b/m.gguf?signature=secret", "m"),
        (f"http://a.b/m.gguf#sha256={64 * 'a'}", "m"),
        ("pypi:a==1/b/m.gguf", "m"),
    ],
)
def test_a_model_has_the_name_of_its_file(tmp_path: Path, model: str, name: str) -> None:
    assert load(tmp_path, SMALL.replace("model: m", f"model: {model!r}")).model_name == name


@pytest.mark.parametrize("launcher", ["local", "mpi"])
@pytest.mark.parametrize(("count", "names"), [(1, ["a"]), (3, ["a", "b", "c"]), (27, ["worker-1", "worker-27"])])
def test_a_number_of_workers_names_them(tmp_path: Path, launcher: str, count: int, names: list[str]) -> None:
    config = load(tmp_path, f"model: m\nlauncher: {launcher}\nworkers: {count}")
    given = [worker.name for worker in config.workers]
    assert len(given) == count and not config.awaits_any
    assert [*dict.fromkeys([*given[: len(names) - 1], given[-1]])] == names
    assert load(tmp_path, f"model: m\nlauncher: static\nworkers: {count}").awaits_any
