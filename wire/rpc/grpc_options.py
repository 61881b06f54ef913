"""Settings that the gRPC library takes from the environment only, before its first import. Imports no gRPC."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_MEASURED_VERSIONS = ("1.85.",)
"""Of gRPC, which does not document these names: a release that lacks them would print a complaint and go on. Others use
their own event loop: the same results, slower links between machines. What a message takes: benchmarks/notebook.md."""


def tune_grpc() -> None:
    """For process mains, as early as possible: the event loop that answers faster, for links between machines (those on
    one need no gRPC), and no chatter on standard error.

    What the user has set stays. Without effect once gRPC is imported.
    """
    if "grpc" in sys.modules:
        return
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if version("grpcio").startswith(_MEASURED_VERSIONS):
        os.environ.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)
