"""Names the workers that a launcher starts if a cluster file gives only their number."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from llamaclust.cluster.config.launcher_facts import LAUNCHERS
from llamaclust.core.limits import MAX_WORKERS


def with_named_workers(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces the number `workers` by sections with names, unless users start the workers, with their own names."""
    count, launcher = values.get("workers"), values.get("launcher", "local")
    started = [name for name, facts in LAUNCHERS.items() if facts.starts_workers]
    if (
        not isinstance(count, int)
        or isinstance(count, bool)
        or not 1 <= count <= MAX_WORKERS
        or launcher not in started
    ):
        return values
    names = ascii_lowercase if count <= len(ascii_lowercase) else [f"worker-{index}" for index in range(1, count + 1)]
    return {**values, "workers": [{"name": name} for name in names[:count]]}
