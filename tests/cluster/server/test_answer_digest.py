"""Tests which settings must be unchanged for the answer to a journalled request."""

from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.server.front import KEYS, answer_digest

_SAME_ANSWERS = frozenset(
    {
        *("name", "launcher", "join", "ray", "insecure", "listen", "listen_also", "listen_tls", "workers"),
        *("models", "max_loaded_models", "load_on_demand", "plan", "objective", "groups"),
        *("kv_memory", "max_sequences", "max_waiting", "prefill_chunk", "prefix_cache", "speculative"),
        *("cpu_moe", "experts_cache", "placement", "wide_tiles"),
        *("allowed_hosts", "allowed_origins", "api_keys_file", "state_dir", "lease", "telemetry", "timeouts"),
    }
)


def _config(tmp_path: Path, **changed: Any) -> ClusterConfig:
    values = {"model": "m.gguf", "workers": [{"name": "a"}], "state_dir": str(tmp_path), **changed}
    return ClusterConfig.model_validate(values)


def test_every_key_of_the_cluster_file_changes_answers_or_does_not() -> None:
    assert not KEYS & _SAME_ANSWERS
    assert KEYS <= ClusterConfig.model_fields.keys() <= KEYS | _SAME_ANSWERS


def test_a_change_of_answers_changes_the_digest(tmp_path: Path) -> None:
    config = _config(tmp_path)
    digests = {
        "": answer_digest(config, "id", "template", 512),
        "model": answer_digest(config, "other", "template", 512),
        "mmproj": answer_digest(config, "id projector", "template", 512),
        "chat_template": answer_digest(config, "id", "other", 512),
        "context_length": answer_digest(config, "id", "template", 256),
        "wire": answer_digest(config.model_copy(update={"wire": "f16"}), "id", "template", 512),  # a future wire type
        "api": answer_digest(_config(tmp_path, api={"defaults": {"temperature": 1}}), "id", "template", 512),
        "adapters": answer_digest(_config(tmp_path, adapters=[{"name": "a", "path": "/a"}]), "id", "template", 512),
        "kv_type": answer_digest(_config(tmp_path, kv_type="q8_0"), "id", "template", 512),
    }
    assert digests.keys() - {""} == KEYS
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize(
    "changed",
    [
        *(
            {"prefill_chunk": 7},
            {"prefix_cache": False},
            {"max_sequences": 3},
            {"speculative": "off"},
            {"timeouts": {"request": "1min"}},
        ),
        {"api": {"prefix": "/llm", "aliases": ["m"]}},
    ],
)
def test_other_settings_do_not(tmp_path: Path, changed: dict[str, Any]) -> None:
    unchanged = answer_digest(_config(tmp_path), "id", "template", 512)
    assert answer_digest(_config(tmp_path, **changed), "id", "template", 512) == unchanged
