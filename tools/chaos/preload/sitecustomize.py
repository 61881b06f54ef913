"""Installs the faults of workers. Python imports this at the start of processes with this folder in PYTHONPATH."""

import sys

if not {"llamaclust.worker", "worker"}.isdisjoint(sys.orig_argv):
    from llamaclust.tools.chaos.worker_faults import install

    install()
