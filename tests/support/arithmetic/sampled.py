"""The sampler's result for one row, and sampler settings that all differ from the defaults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.client.http_codec import AnswerOptions
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.kernels.sampling import Sampler

SAMPLERS: AnswerOptions = {
    "top_n_sigma": 2.0,
    "tfs_z": 0.9,
    "typical_p": 0.8,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "dynatemp_range": 0.3,
    "dynatemp_exponent": 2.0,
    "dry_multiplier": 0.7,
    "dry_base": 2.0,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": 50,
    "dry_sequence_breakers": ["a", "\n"],
    "mirostat_tau": 4.0,
    "mirostat_eta": 0.2,
    "penalize_nl": False,
    "samplers": ["xtc", "dry", "typ_p"],
}

_SECOND_DRAW = 1 << 31


def second_draw(task: RowTask) -> RowTask:
    """Returns the task with a different random draw, as native `second_draws` does after a grammar's refusal."""
    return replace(task, choice=task.choice + _SECOND_DRAW) if isinstance(task, SampleTask) else task


def sampled(sampler: Sampler, logits_row: NDArray[np.float32], task: RowTask) -> RowResult:
    """Returns the sampler's result for one row [vocabulary]."""
    return sampler.run(logits_row[np.newaxis], (task,))[0]
