"""Where models lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from llamaclust.errors import UsageError

HOME_VARIABLE = "LLAMACLUST_HOME"


def default_models_dir() -> Path:
    """`$LLAMACLUST_HOME/models`, or `~/.local/share/llamaclust/models`; UsageError for a home that is not absolute."""
    home = os.environ.get(HOME_VARIABLE)
    if not home:
        return Path.home() / ".local" / "share" / "llamaclust" / "models"
    path = Path(home).expanduser()
    if not path.is_absolute():
        raise UsageError(f"{HOME_VARIABLE}={home}: not an absolute path; set it to one, or unset it")
    return path / "models"
