"""Measures perplexity as llama.cpp does: a text is cut into chunks, and the second half of each chunk is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llamaclust.cluster.client.base import TextClient
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.regular_file import decode_text
from llamaclust.model.tokenizers.tokenizer import Tokenizer

OnChunk = Callable[["Perplexity"], None]

MOST_NLL = 700.0
_CHECKED_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood of `tokens` scored tokens, with its standard error."""

    perplexity: float
    stderr: float
    chunks: int
    tokens: int

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


class Accumulator:
    """Sums logprobs in float64 and in the order of tokens, so that equal logprobs give equal results."""

    def __init__(self) -> None:
        self._chunks = 0
        self._tokens = 0
        self._sum = 0.0
        self._squares = 0.0

    def add(self, logprobs: Iterable[float]) -> None:
        for logprob in logprobs:
            self._sum -= logprob
            self._squares += logprob * logprob
            self._tokens += 1
        self._chunks += 1

    @property
    def result(self) -> Perplexity:
        """The perplexity so far. Raises LlamaclustError if the probability of the text is too small for a float."""
        mean = self._sum / self._tokens
        if mean > MOST_NLL:
            raise LlamaclustError(
                f"the text is almost impossible for the model: {mean:.4g} nats per token; check the model and the text"
            )
        variance = self._squares / self._tokens - mean * mean
        error = math.sqrt(max(0.0, variance) / max(1, self._tokens - 1))
        return Perplexity(math.exp(mean), error * math.exp(mean), self._chunks, self._tokens)


def read_text(path: Path) -> str:
    if path.exists() and not (path.is_file() or path.is_fifo()):
        raise UsageError(f"{path}: not a text file; give the name of a text file")
    try:
        return decode_text(path.read_bytes()).removesuffix("\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def cut(tokenizer: Tokenizer, text: str, context: int, most: int | None) -> list[tuple[int, ...]]:
    """Returns the first `most` chunks of `context` tokens, or all chunks if `most` is None. If the model needs BOS, a
    chunk's first token becomes BOS. Raises UsageError if the text is shorter than a chunk."""
    ids = tokenizer.encode(text)
    if len(ids) < context:
        raise UsageError(
            f"the text has {len(ids)} tokens, but a chunk has {context}: take a longer text or a smaller -c"
        )
    starts = range(0, len(ids) - context + 1, context)[:most]
    return [begun(tokenizer, tuple(ids[start : start + context])) for start in starts]


def begun(tokenizer: Tokenizer, chunk: tuple[int, ...]) -> tuple[int, ...]:
    return (tokenizer.bos_id, *chunk[1:]) if tokenizer.add_bos and tokenizer.bos_id is not None else chunk


def measure(client: TextClient, chunks: Sequence[tuple[int, ...]], on_chunk: OnChunk) -> Perplexity:
    """Scores tokens [context / 2 + 1, context) of each chunk. `on_chunk` is called with the perplexity so far."""
    sums = Accumulator()
    for chunk in chunks:
        reply = client.generate(chunk, max_tokens=0, score_from=len(chunk) // 2 + 1)
        sums.add(reply.prompt_logprobs)
        on_chunk(sums.result)
    return sums.result


def check_same_model(client: TextClient, tokenizer: Tokenizer, text: str) -> None:
    sample = text[:_CHECKED_CHARACTERS]
    if client.tokenize(sample, add_special=False) != tokenizer.encode(sample, add_special=False, parse_special=True):
        raise UsageError("the tokenizers of the server's model and of the model file differ; give the same model")
