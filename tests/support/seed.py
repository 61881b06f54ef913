"""The seed of random tests: LLAMACLUST_TEST_SEED, or a new seed for each run. Failed runs print it."""

from __future__ import annotations

import os
from random import SystemRandom

_VARIABLE = "LLAMACLUST_TEST_SEED"

SEED = int(os.environ.setdefault(_VARIABLE, str(SystemRandom().randrange(1 << 32))))
"""All processes of a run have the same seed."""
