"""The faults of workers, installed by Python at the start of each process whose PYTHONPATH has this folder."""

import sys

if not {"llamaclust.worker", "worker"}.isdisjoint(sys.orig_argv):
    from llamaclust.tools.chaos.worker_faults import install

    install()
