"""Tests messages about mistakes in cluster files: one line with the place and the allowed values, and exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.config.document import MAX_FILE_BYTES, Document
from llamaclust.cluster.config.errors import explain
from llamaclust.core.errors import UsageError

SMALL = "model: m\nworkers: [{name: a}, {name: b}]\n"

NAME = (
    "is not a name; write 1 to 63 letters, digits, dots, dashes or underscores, "
    "beginning and ending with a letter or digit"
)
COUNT = "give a whole number from 1 to"
AUTO = COUNT.replace("give a", "give auto or a")
ADDRESS = "is not an address; write it like 127.0.0.1:8080 or [::1]:8080"
DECIMAL = "is not a decimal number; write it in decimal digits, or put it in quotes"
ORIGIN = "is not an origin of web pages; write it like https://chat.example"
NO_PATH = "a path cannot contain a zero byte; give the path of a file or folder"
NO_HOME = "begins with a home directory that does not exist; give the whole path"
SIZE = "is not a size; write it like 8GiB or 512MiB (KiB, MiB, GiB, TiB; kB, MB, GB, TB)"

TOP_KEYS = {
    "context_lenght: 5": "unknown key 'context_lenght'; did you mean 'context_length'?",
    "zzz: 5": f"unknown key 'zzz'; known: {', '.join(ClusterConfig.model_fields)}",
    "lease: {names: brain}": "unknown key 'names' in lease; did you mean 'name'?",
    "timeouts: {requests: 5s}": "unknown key 'requests' in timeouts; did you mean 'request'?",
    "context_length: 0": f"context_length: 0 is not possible; {AUTO} 1048576",
    "context_length: 1048577": f"context_length: 1048577 is not possible; {AUTO} 1048576",
    "context_length: yes": f"context_length: true is not possible; {AUTO} 1048576",
    "context_length: 4k": f"context_length: '4k' is not possible; {AUTO} 1048576",
    "context_length: 1.5": f"context_length: 1.5 is not possible; {AUTO} 1048576",
    "max_sequences: null": f"max_sequences: an empty value is not possible; {COUNT} 1024",
    "context_length: 2024-13-45": "not valid YAML: '2024-13-45' is not a number or date; put it in quotes",
    "context_length: 0777": f"not valid YAML: '0777' {DECIMAL}",
    "context_length: 0x1F": f"not valid YAML: '0x1F' {DECIMAL}",
    "context_length: 1_000": f"not valid YAML: '1_000' {DECIMAL}",
    "context_length: -0b11": f"not valid YAML: '-0b11' {DECIMAL}",
    "timeouts: {request: 10:20}": f"not valid YAML: '10:20' {DECIMAL}",
    "timeouts: {request: 1:30.5}": f"not valid YAML: '1:30.5' {DECIMAL}",
    "name: 007": f"not valid YAML: '007' {DECIMAL}",
    "max_sequences: 1000000": f"max_sequences: 1000000 is not possible; {COUNT} 1024",
    "max_waiting: -1": "max_waiting: -1 is not possible; give a whole number from 0 to 100000",
    "prefill_chunk: none": "prefill_chunk: 'none' is not possible; give auto or a whole number from 1 to 4096",
    "prefix_cache: 1": "prefix_cache: 1 is not possible; give true or false",
    "experts_cache: 4": "experts_cache: 4 has no unit: write 4GiB, 4MiB, or at least 1048576 bytes",
    "api: {defaults: }": "api.defaults: an empty value is not possible; give keys with values",
    "speculative: null": "speculative: an empty value is not possible; give auto, off, or a section of keys",
    "speculative: ngram": (
        "speculative: 'ngram' is not possible; "
        "give auto or on or off or true or false or keys with values: max_window, shared_answers, model, mtp, threads"
    ),
    "speculative: {max_window: 33}": ("speculative.max_window: 33 is not possible; give a whole number from 1 to 32"),
    "speculative: {shared_answers: 9}": (
        "speculative.shared_answers: 9 tokens are too few to share; set 1024 or more, or 0 to share none"
    ),
    "speculative: {threads: 3}": (
        "speculative.threads: is for a draft model: set speculative.model, or remove this key"
    ),
    "speculative: {n_max: 3}": (
        "unknown key 'n_max' in speculative; known: max_window, shared_answers, model, mtp, threads"
    ),
    "launcher: foo": "launcher: 'foo' is not possible; give local or static or ray or mpi",
    "wire: f64": "wire: 'f64' is not possible; give f32",
    "wire: q8_0": "wire: q8_0 is not supported yet; give f32",
    "kv_type: 8": "kv_type: 8 is not possible; give f16 or q8_0 or int8",
    "objective: speed": "objective: 'speed' is not possible; give latency or throughput",
    "kv_memory: 5 pounds": f"kv_memory: '5 pounds' {SIZE}",
    "kv_memory: [1]": f"kv_memory: [1] {SIZE}",
    "kv_memory: 24": "kv_memory: 24 has no unit: write 24GiB, 24MiB, or at least 1048576 bytes",
    "kv_memory: 0": "kv_memory: 0 is not a possible size; give 1B to 1024TiB",
    "listen_tls: true": "listen_tls: true is not possible; give self-signed or keys with values: certificate, key",
    "listen_tls: {certificate: a.pem}": "listen_tls.certificate: certificate and key go together: give key as well",
    "listen_tls: {key: a.pem}": "listen_tls.key: certificate and key go together: give certificate as well",
    "listen_tls: {cert: a.pem}": "unknown key 'cert' in listen_tls; did you mean 'certificate'?",
    "allowed_origins: [chat.example]": f"allowed_origins[0]: 'chat.example' {ORIGIN}",
    "allowed_origins: [https://chat.example/page]": f"allowed_origins[0]: 'https://chat.example/page' {ORIGIN}",
    "adapters: poet": "adapters: 'poet' is not possible; give a list of 0 to 16 items",
    "adapters: [{name: poet}]": "key 'path' is missing in adapters[0]",
    "adapters: [{name: m, path: a}, {name: m, path: b}]": (
        "adapters[0].name: 'm' is also the name of another adapter or of the model; give it its own name"
    ),
    "telemetry: {endpoint: 'localhost:4318'}": (
        "telemetry.endpoint: 'localhost:4318' is not possible; give text like http://localhost:4318"
    ),
    "telemetry: {sample_ratio: 2}": "telemetry.sample_ratio: 2 is not possible; give a number from 0 to 1",
    "telemetry: {sample_ratio: x}": "telemetry.sample_ratio: 'x' is not possible; give a number from 0 to 1",
    "adapters: [{name: p, path: a, scale: 2000}]": (
        "adapters[0].scale: 2000 is not possible; give a number from -1000 to 1,000"
    ),
    "listen: localhost": f"listen: 'localhost' {ADDRESS}",
    "listen: 8080": f"listen: 8080 {ADDRESS}",
    "listen: 0.0.0.0:80": "listen: 0.0.0.0:80 can be reached from other machines: set api_keys_file as well",
    "name: 'a/b'": f"name: 'a/b' {NAME}",
    "name: ''": f"name: '' {NAME}",
    f"name: {'a' * 64}": f"name: '{'a' * 59}... {NAME}",
    "name: 5": "name: 5 is not a name; put it in quotes",
    "plan: best": "plan: 'best' is not possible; give auto or a list of 1 to 256 items",
    "plan: []": "plan: [] is not possible; give auto or a list of 1 to 256 items",
    "plan: [a]": "plan[0]: 'a' is not possible; give keys with values: worker, workers, shares, layers",
    "plan: [{worker: a}]": "key 'layers' is missing in plan[0]",
    "plan: [{layers: [0, 3]}]": "plan[0]: names no worker: give `worker`, or `workers` for a group",
    "plan: [{worker: a, workers: [a, b], layers: [0, 3]}]": (
        "plan[0]: has both: give `worker`, or `workers` for a group"
    ),
    "plan: [{workers: [a], layers: [0, 3]}]": "plan[0].workers: ['a'] is not possible; give a list of 2 to 16 items",
    "plan: [{workers: [a, bee], layers: [0, 3]}]": "plan[0].workers: unknown worker 'bee'; did you mean 'b'?",
    "plan: [{workers: [a, b], layers: [0, 3], shares: [1]}]": (
        "plan[0].shares: [1] is not possible; give a list of 2 to 16 items"
    ),
    "plan: [{workers: [a, b], layers: [0, 3], shares: [2, 1, 1]}]": (
        "plan[0].shares: 3 shares for 2 workers; give one each"
    ),
    "plan: [{workers: [a, b], layers: [0, 3], shares: [0, 1]}]": (
        "plan[0].shares[0]: 0 is not possible; give a whole number from 1 to 10000"
    ),
    "plan: [{worker: a, layers: [0, 3], shares: [2, 1]}]": (
        "plan[0].shares: is for groups, but this stage has one worker; remove it"
    ),
    "plan: [{worker: a, layers: 3}]": ("plan[0].layers: 3 is not a layer range; write [0, 12] for layers 0 to 11"),
    "plan: [{worker: a, layers: [3, 3]}]": (
        "plan[0].layers: [3, 3] is an empty layer range; ranges are half-open: [start, end) with start < end"
    ),
    f"plan: [{{worker: a, layers: [0, {'9' * 400}]}}]": (
        f"plan[0].layers: [0, {'9' * 56}... is not a layer range: no model has more than 65536 layers"
    ),
    f"plan: [{{worker: a, layers: [{'9' * 400}, 0]}}]": (
        f"plan[0].layers: [{'9' * 59}... is an empty layer range; ranges are half-open: [start, end) with start < end"
    ),
    "plan: [{worker: a, layers: [0, .inf]}]": (
        "plan[0].layers: [0, inf] is not a layer range: no model has more than 65536 layers"
    ),
    "plan: [{worker: a, layers: [0, .nan]}]": (
        "plan[0].layers: [0, nan] is an empty layer range; ranges are half-open: [start, end) with start < end"
    ),
    "plan: [{worker: c, layers: [0, 3]}]": "plan[0].worker: unknown worker 'c'; known: a, b",
    "allowed_hosts: x.org": "allowed_hosts: 'x.org' is not possible; give a list of 0 to 64 items",
    "allowed_hosts: [5]": "allowed_hosts[0]: 5 is not possible; give text",
    "state_dir: 5": "state_dir: 5 is not possible; give text",
    'state_dir: "a\\0b"': f"state_dir: {NO_PATH}",
    'state_dir: "~a\\0b"': f"state_dir: {NO_PATH}",
    'api_keys_file: "k\\0"': f"api_keys_file: {NO_PATH}",
    "state_dir: ~no-such-user/x": f"state_dir: '~no-such-user/x' {NO_HOME}",
    "api_keys_file: ''": "api_keys_file: '' is not possible; give text",
    "timeouts: 5s": (
        "timeouts: '5s' is not possible; "
        "give keys with values: request, worker, load, recovery, resume, idle, coordinator"
    ),
    "timeouts: {request: soon}": "timeouts.request: 'soon' is not a duration; write it like 600s, 10min or 250ms",
    "timeouts: {request: null}": (
        "timeouts.request: an empty value is not a duration; write it like 600s, 10min or 250ms"
    ),
    "timeouts: {request: 31d}": "timeouts.request: '31d' is not a duration; write it like 600s, 10min or 250ms",
    f"timeouts: {{request: 1{'0' * 400}}}": (
        f"timeouts.request: 1{'0' * 59}... is not a possible duration; give more than 0 and at most 30 days"
    ),
    "timeouts: {load: 900ms}": "timeouts.load: 0.9 s is too short to detect a load that hangs; set 1s or more",
    "timeouts: {worker: 10ms}": "timeouts.worker: 0.01 s is too short to detect a lost worker; set 500ms or more",
    "timeouts: {worker: 25h}": "timeouts.worker: 90000 s is too long for a worker's silence; set 24h or less",
    "model: x": "not valid YAML: duplicate key 'model'",
    "5: x": "not valid YAML: key '5' is not a word; put it in quotes",
    "timeouts: {yes: 5s}": "not valid YAML: key 'yes' is not a word; put it in quotes",
    "plan: &a [*a]": "not valid YAML: aliases (*name) are not accepted",
    f"plan: {'[' * 100_000}": "not valid YAML: nested deeper than 16 levels",
    "name: !!python/object:os.system {}": "not valid YAML: tags (!name) are not accepted",
    "name: !!bool x": "not valid YAML: tags (!name) are not accepted",
    'name: "\1"': "not valid YAML: unacceptable character #x0001: special characters are not allowed",
    f"context_length: {'1' * 5000}": (f"not valid YAML: '{'1' * 60}' is not a number or date; put it in quotes"),
}


def failure(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message and len(message) < 480 + len(str(folder))
    return message.replace(str(path), "FILE")


@pytest.mark.parametrize(("text", "message"), TOP_KEYS.items(), ids=[text[:40] for text in TOP_KEYS])
def test_mistakes_name_line_place_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    assert failure(tmp_path, f"{SMALL}{text}\n") == f"FILE:3: {message}"


@pytest.mark.parametrize(
    ("worker", "line", "message"),
    [
        ("- name: a\n  device: tpu", 5, "workers[1].device: 'tpu' is not a device; give cpu, cuda:0, or several as"),
        (
            "- name: a\n  device: cuda:\u0661",
            5,
            "workers[1].device: 'cuda:\u0661' is not a device; give cpu, cuda:0, or",
        ),
        ("- name: a\n  device: [cpu, cuda:0]", 5, "workers[1].device: 'cpu' cannot be combined with GPUs"),
        (
            "- name: a\n  device: [cuda:0, cuda]",
            5,
            "workers[1].device: ['cuda:0', 'cuda']: list at most 16 GPUs, and each only once",
        ),
        ("- name: a\n  gpu_layers: 3", 5, "workers[1].gpu_layers: is for workers with a GPU: set device to cuda:0 as"),
        ("- name: a\n  threads: 0", 5, f"workers[1].threads: 0 is not possible; {COUNT} 1024"),
        ("- name: a\n  memory: much", 5, f"workers[1].memory: 'much' {SIZE}"),
        (
            "- name: a\n  memory_bandwidth_gb_s: 20",
            5,
            "workers[1].memory_bandwidth_gb_s: memory_bandwidth_gb_s and int8_gmac_s go together: give both, or none",
        ),
        (
            "- name: a\n  int8_gmac_s: 20",
            5,
            "workers[1].int8_gmac_s: memory_bandwidth_gb_s and int8_gmac_s go together: give both, or none",
        ),
        (
            "- name: a\n  int8_gmac_s: 1\n  memory_bandwidth_gb_s: .inf",
            6,
            "workers[1].memory_bandwidth_gb_s: inf is not possible; give a number above 0 and up to 1,000,000",
        ),
        ("- name: a\n  thread: 2", 5, "unknown key 'thread' in workers[1]; did you mean 'threads'?"),
        ("- threads: 2", 4, "key 'name' is missing in workers[1]"),
        ("- a", 4, "workers[1]: 'a' is not possible; give keys with values: name, device, gpu_layers, gpu_memory"),
        ("- name: first", 4, "workers[1].name: two workers are named 'first'; give each its own name"),
        ("-", 4, "workers[1]: an empty value is not possible; give keys with values: name"),
    ],
)
def test_mistakes_in_workers_have_their_own_line(tmp_path: Path, worker: str, line: int, message: str) -> None:
    text = f"model: m\nworkers:\n- name: first\n{worker}\n"
    assert failure(tmp_path, text).startswith(f"FILE:{line}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers: [{name: a}]", "FILE: key 'model' is missing"),
        ("model: m", "FILE: key 'workers' is missing"),
        ("model: ''\nworkers: [{name: a}]", "FILE:1: model: '' is not possible; give text of 1 to 4096 characters"),
        ("model: m\nworkers: []", "FILE:2: workers: [] is not possible; give a list of 1 to 256 items"),
        ("model: m\nworkers: 0", "FILE:2: workers: 0 is not possible; give 1 to 256"),
        (
            "model: m\nworkers:\n",
            "FILE:2: workers: an empty value is not possible; "
            "give a list of 1 to 256 items or a whole number from 1 to 256",
        ),
        ("- a", "FILE: not a cluster file"),
        ("", "FILE: not a cluster file"),
        ("x" * (MAX_FILE_BYTES + 1), "FILE: the file is larger than 1024 KiB"),
        (f"model: m\nworkers: [{'1,' * 300_000}]", "FILE:2: not valid YAML: there are more than 20000 keys"),
        ("model: m\nname: [", "FILE:2: not valid YAML: while parsing a flow node"),
        ("model: m\n---\nmodel: n", "FILE:2: not valid YAML: expected a single document in the stream, but found"),
    ],
)
def test_files_that_are_wrong_as_a_whole(tmp_path: Path, text: str, message: str) -> None:
    assert failure(tmp_path, text).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("listen", "--set listen must be KEY=VALUE, for example timeouts.request=60s"),
        ("workers.a.memory=8", "--set workers.a.memory=8: workers[0].memory: 8 has no unit: write 8GiB, 8MiB, or"),
        ("gpu_layers=9", "--set gpu_layers=9: unknown key 'gpu_layers'; it is a key of workers: give it under"),
        ("device=cuda:0", "--set device=cuda:0: unknown key 'device'; it is a key of workers: give it under"),
        ("gpu_memory=9GiB", "--set gpu_memory=9GiB: unknown key 'gpu_memory'; it is a key of workers: give it under"),
        ("recovery=9s", "--set recovery=9s: unknown key 'recovery'; it is a key of `timeouts`: timeouts.recovery with"),
        ("worker=9s", "--set worker=9s: unknown key 'worker'; did you mean 'workers'?"),  # two sections have this key
        ("listen=x", f"--set listen=x: listen: 'x' {ADDRESS}"),
        ("workers.b.threads=x", f"--set workers.b.threads=x: workers[1].threads: 'x' is not possible; {COUNT} 1024"),
        ("workers.b.thread=1", "--set workers.b.thread=1: unknown key 'thread' in workers[1]; did you mean 'threads'?"),
        ("workers.c.threads=1", "--set workers.c.threads=1: there is no item 'c'; the items are a, b"),
        ("model.file=1", "--set model.file=1: 'm' has no keys to set"),
        ("model=[", "--set model=[:1: not valid YAML"),
        ("na\nme=1", "--set na me=1: unknown key"),
    ],
)
def test_overrides_are_named_where_they_are_wrong(tmp_path: Path, override: str, message: str) -> None:
    assert failure(tmp_path, SMALL, override).startswith(message)


def test_each_key_with_limits_or_a_form_is_named_with_them() -> None:
    """Checks that `explain` says what to give for such keys of all sections."""
    schema = ClusterConfig.model_json_schema()
    seen = 0
    for section in schema["$defs"].values():
        for key, values in section.get("properties", {}).items():
            kinds = [option.get("type") for option in values.get("anyOf", [values])]
            if "number" in kinds or ("string" in kinds and "examples" in str(values)):
                document = Document("FILE", {}, {})
                details = [InitErrorDetails(type="string_type", loc=(key,), input=[])]
                error = ValidationError.from_exception_data("", details)
                assert "give " in explain(error, document, {**section, "$defs": schema["$defs"]}), key
                seen += 1
    assert seen >= 9


def test_an_override_leaves_the_lines_of_all_else(tmp_path: Path) -> None:
    text = "model: m\nworkers:\n- name: a\n- name: b\n  threads: 0\n"
    assert failure(tmp_path, text, "workers.a.threads=1").startswith("FILE:5: workers[1].threads: 0")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "worker", "x"]), inner),
    max_leaves=4,
)


@settings(deadline=None)
@given(key=st.sampled_from(sorted(ClusterConfig.model_fields)), value=VALUES)
def test_any_value_of_any_key_is_taken_or_refused_in_plain_words(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "workers": [{"name": "a"}], key: value}, sort_keys=False))
    try:
        load_config(path)
    except UsageError as error:
        message = str(error)
        assert "\n" not in message and key in message and message.startswith(f"{path}:"), message
        assert "nput should" not in message and "pydantic" not in message and "alue error" not in message, message
