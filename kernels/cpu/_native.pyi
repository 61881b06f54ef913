"""Types of the compiled module (kernels/cpu/native)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def available_levels() -> list[str]: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def exp(x: NDArray[np.float32], out: NDArray[np.float32], feature_level: str) -> None: ...
def log(x: float) -> float: ...
def sincos(angle: float) -> tuple[float, float]: ...

class RowTask:
    @staticmethod
    def sample(
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        logit_bias: Sequence[tuple[int, float]],
        seed: int,
        choice: int,
        position: int,
        history: Sequence[int],
        suppressed: Sequence[int],
        top_logprobs: int,
    ) -> RowTask: ...
    @staticmethod
    def score(token: int, top_logprobs: int) -> RowTask: ...

class RowOutcome:
    token: int
    logprob: float
    top_logprobs: list[tuple[int, float]]
    failure: str

class Sampler:
    def __init__(self, vocabulary: int, feature_level: str) -> None: ...
    def run(self, logits: NDArray[np.float32], tasks: Sequence[RowTask]) -> list[RowOutcome]: ...
