"""Where models lie on this machine."""

from __future__ import annotations

from pathlib import Path

from llamaclust.cluster.config.environment import environment


def default_models_dir() -> Path:
    """The folder `models` in the program's home; UsageError where a LLAMACLUST_* variable has a bad value."""
    return environment().home / "models"
