"""Settings that the gRPC library takes from the environment only, before its first import. Imports no gRPC."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_MEASURED_VERSIONS = ("1.85.",)
"""Releases of gRPC in which these undocumented names were measured; others, which would print a complaint, use their
own event loop: the same results, slower links between machines. Figures: benchmarks/notebook.md."""


def tune_grpc() -> None:
    """Sets gRPC's faster event loop for links between machines, before gRPC is imported. Settings of the user stay."""
    if "grpc" in sys.modules:
        return
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if version("grpcio").startswith(_MEASURED_VERSIONS):
        os.environ.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)
