"""The digest of all that answers depend on beside requests: journalled requests continue only where it is the same."""

from __future__ import annotations

import hashlib
import json

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.version import VERSION

KEYS = frozenset({"model", "chat_template", "context_length", "wire", "kv_type", "api", "adapters"})
"""Of the cluster file: those that change answers; of `api`, its defaults. The adapters' files are in the model's id."""


def answer_digest(config: ClusterConfig, model_id: str, chat_template: str | None, context_length: int) -> str:
    """`chat_template`: its source, from which the format of answers follows in one version; `context_length`: of the
    plan."""
    defaults = json.dumps(config.api.defaults, sort_keys=True, default=str)
    adapters = tuple((adapter.name, adapter.scale) for adapter in config.adapters)
    keys = (model_id, chat_template, context_length, config.wire, config.kv_type.value, defaults, adapters)
    return hashlib.sha256(repr((VERSION, NUMERICS_VERSION, *keys)).encode()).hexdigest()
