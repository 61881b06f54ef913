"""Settings that gRPC reads only from the environment, when it is first imported. This module does not import it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_MEASURED_VERSIONS = ("1.85.",)
"""The gRPC releases with which these undocumented experiments were measured. Others would print a warning, so they keep
gRPC's own event loop: equal results, slower links between machines. Figures: benchmarks/notebook.md."""


def tune_grpc() -> None:
    """Selects gRPC's faster event loop for links between machines, before gRPC is imported. User settings stay."""
    if "grpc" in sys.modules:
        return
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if version("grpcio").startswith(_MEASURED_VERSIONS):
        os.environ.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)
