"""Names the workers that a launcher starts if a cluster file gives only their number."""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

from llamaclust.cluster.config.launcher_facts import LAUNCHERS
from llamaclust.core.limits import MAX_WORKERS


def with_named_workers(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces the number `workers` by sections with names, unless users start the workers, with their own names."""
    count, chosen = values.get("workers"), values.get("launcher", "local")
    starts = any(name == chosen and facts.starts_workers for name, facts in LAUNCHERS.items())
    if not (starts and isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= MAX_WORKERS):
        return values
    names = ascii_lowercase if count <= len(ascii_lowercase) else [f"worker-{index}" for index in range(1, count + 1)]
    return {**values, "workers": [{"name": name} for name in names[:count]]}
