"""The seed of tests that draw at random: LLAMACLUST_TEST_SEED, or a new one in each run; printed where a test fails."""

from __future__ import annotations

import os
from random import SystemRandom

_VARIABLE = "LLAMACLUST_TEST_SEED"

SEED = int(os.environ.setdefault(_VARIABLE, str(SystemRandom().randrange(1 << 32))))
"""The same in all processes of a run."""
