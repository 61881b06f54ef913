"""Compares two models' predictions, with the statistics of llama.cpp's `llama-perplexity --kl-divergence`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.evaluate.logits_file import Float32
from llamaclust.tools.evaluate.perplexity import MOST_NLL

Float64 = NDArray[np.float64]

_ROWS_AT_ONCE: Final = 16
"""Number of positions to compare at once. Their logits and intermediate values fit in the cache of a core."""
_LEAST_LOGPROB: Final = -16.0
_FEW: Final = 10
_QUANTILES: Final = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error (0 for too few values)."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: Float64) -> Estimate:
        mean = float(values.mean())
        spread = float(np.mean(values**2)) - mean * mean
        return cls(mean, math.sqrt(spread / (values.size - 1)) if spread > 0 and values.size > _FEW else 0.0)

    def exp(self) -> Estimate:
        """Returns the estimate of e^value. Raises LlamaclustError if the value is too large for a float."""
        if self.value > MOST_NLL:
            raise LlamaclustError(
                f"the text is almost impossible for a model: {self.value:.4g} nats per token; check model and text"
            )
        return Estimate(math.exp(self.value), math.exp(self.value) * self.stderr)


@dataclass(frozen=True, slots=True)
class Scores:
    """Statistics of each token. All arrays have the shape [tokens]."""

    nll: Float64  # Negative logprob of the token by the model.
    base_nll: Float64  # Negative logprob of the token by the base.
    kld: Float64  # Sum over the vocabulary of p_base * (log p_base - log p).
    same_top: Float64  # 1 if model and base have the same likeliest token, else 0.

    @property
    def p_difference(self) -> Float64:
        return np.exp(-self.nll) - np.exp(-self.base_nll)


def compare(logits: Float32, base: Float32, tokens: Sequence[int]) -> Scores:
    """Compares a model's logits with a base model's logprobs, both [rows, vocabulary]. `tokens` has a token per row."""
    parts = [
        _compare(logits[at : at + _ROWS_AT_ONCE], base[at : at + _ROWS_AT_ONCE], tokens[at : at + _ROWS_AT_ONCE])
        for at in range(0, len(tokens), _ROWS_AT_ONCE)
    ]
    return joined(parts)


def joined(parts: Sequence[Scores]) -> Scores:
    return Scores(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def _compare(logits: Float32, base: Float32, tokens: Sequence[int]) -> Scores:
    rows, most = np.arange(len(tokens)), logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    logprobs = logits - (most + total)
    weight = np.exp(base)
    weight[base <= _LEAST_LOGPROB] = 0
    kld = (weight * (base - logprobs)).sum(axis=1, dtype=np.float64)
    same = logits.argmax(axis=1) == base.argmax(axis=1)
    nll, base_nll = -logprobs[rows, tokens], -base[rows, tokens]
    return Scores(nll.astype(np.float64), base_nll.astype(np.float64), kld, same.astype(np.float64))


@dataclass(frozen=True, slots=True)
class Divergence:
    """Statistics of all compared tokens. A perplexity ratio above 1 means that the base model is better."""

    scores: Scores
    chunks: int

    @property
    def tokens(self) -> int:
        return self.scores.nll.size

    @property
    def perplexity(self) -> Estimate:
        return Estimate.of(self.scores.nll).exp()

    @property
    def base_perplexity(self) -> Estimate:
        return Estimate.of(self.scores.base_nll).exp()

    @property
    def log_ratio(self) -> Estimate:
        """The logarithm of perplexity / base perplexity. The standard error accounts for the models' correlation."""
        mine, base = Estimate.of(self.scores.nll), Estimate.of(self.scores.base_nll)
        variance = mine.stderr**2 + base.stderr**2 - 2 * self._covariance
        return Estimate(mine.value - base.value, math.sqrt(max(0.0, variance)))

    @property
    def difference(self) -> Estimate:
        mine, base = self.perplexity, self.base_perplexity
        variance = mine.stderr**2 + base.stderr**2 - 2 * mine.value * base.value * self._covariance
        return Estimate(mine.value - base.value, math.sqrt(max(0.0, variance)))

    @property
    def correlation(self) -> float:
        """The correlation of both models' negative logprobs, or 0 for too few tokens."""
        errors = Estimate.of(self.scores.nll).stderr * Estimate.of(self.scores.base_nll).stderr
        return self._covariance / errors if errors else 0.0

    @property
    def kld(self) -> Estimate:
        return Estimate.of(self.scores.kld)

    @property
    def p_difference(self) -> Estimate:
        return Estimate.of(self.scores.p_difference)

    @property
    def p_difference_rms(self) -> Estimate:
        square = Estimate.of(self.scores.p_difference**2)
        rms = math.sqrt(square.value)
        return Estimate(rms, 0.5 / rms * square.stderr if rms else 0.0)

    @property
    def same_top(self) -> Estimate:
        share = float(self.scores.same_top.mean())
        return Estimate(share, math.sqrt(share * (1 - share) / max(1, self.tokens - 1)))

    @property
    def kld_quantiles(self) -> dict[str, float]:
        return _quantiles(self.scores.kld)

    @property
    def p_difference_quantiles(self) -> dict[str, float]:
        return _quantiles(self.scores.p_difference)

    @property
    def _covariance(self) -> float:
        mine, base = self.scores.nll, self.scores.base_nll
        if self.tokens < _FEW:
            return 0.0
        return float(np.mean(mine * base) - mine.mean() * base.mean()) / (self.tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """Returns all statistics. Shares are in [0, 1]. An estimate is a pair of value and standard error."""
        names = ("base_perplexity", "log_ratio", "difference", "kld", "p_difference", "p_difference_rms", "same_top")
        mine, ratio = self.perplexity, self.log_ratio.exp()
        return {
            "perplexity": mine.value,
            "stderr": mine.stderr,
            "chunks": self.chunks,
            "tokens": self.tokens,
            **{name: _pair(getattr(self, name)) for name in names},
            "ratio": _pair(ratio),
            "correlation": self.correlation,
            "kld_quantiles": self.kld_quantiles,
            "p_difference_quantiles": self.p_difference_quantiles,
        }


def _pair(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.stderr]


def _quantiles(values: Float64) -> dict[str, float]:
    names = {1.0: "maximum", 0.5: "median", 0.0: "minimum"}
    found = np.quantile(values, _QUANTILES)
    return {names.get(part, f"{100 * part:.1f}%"): float(value) for part, value in zip(_QUANTILES, found, strict=True)}
