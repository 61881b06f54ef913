"""Scores a model in this process. Writes its logits to a file, or compares them with the logits in another file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llamaclust.cluster.client.local import LocalClient
from llamaclust.core.errors import UsageError
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from llamaclust.tools.evaluate.kl_divergence import Divergence, Scores, compare, joined
from llamaclust.tools.evaluate.logits_file import Float32, LogitsFile, LogitsShape, writing
from llamaclust.tools.evaluate.perplexity import Accumulator, OnChunk, Perplexity, begun


def keep_logits(client: LocalClient, chunks: Sequence[tuple[int, ...]], file: Path, on_chunk: OnChunk) -> Perplexity:
    shape = LogitsShape(len(chunks[0]), client.vocabulary_size, len(chunks))
    sums = Accumulator()
    with writing(file, shape, chunks) as out:
        for chunk in chunks:
            nlls: list[float] = []

            def keep(logits: Float32, chunk: tuple[int, ...] = chunk, nlls: list[float] = nlls) -> None:
                out.add(logits)
                at = shape.first + len(nlls) + 1
                nlls.extend(_logprobs(logits, chunk[at : at + len(logits)]))

            client.each_logits(chunk[:-1], shape.first, keep)
            sums.add(nlls)
            on_chunk(sums.result)
    return sums.result


def measure_divergence(
    client: LocalClient, tokenizer: Tokenizer, base: LogitsFile, chunks: int, on_chunk: Callable[[int, float], None]
) -> Divergence:
    """Compares the model with the first `chunks` chunks of a file. `on_chunk` gets the number of finished chunks and
    the mean divergence so far. Raises UsageError if the file has another vocabulary."""
    shape = base.shape
    if shape.vocabulary != client.vocabulary_size:
        raise UsageError(
            f"{base.path}: its vocabulary has {shape.vocabulary} tokens, but the model's has {client.vocabulary_size}"
        )
    parts: list[Scores] = []
    for number, tokens in enumerate(base.chunks[:chunks]):
        done = 0

        def use(logits: Float32, number: int = number, tokens: tuple[int, ...] = tokens) -> None:
            nonlocal done
            end = done + len(logits)
            at = shape.first + 1
            parts.append(compare(logits, base.logprobs(number, done, end), tokens[at + done : at + end]))
            done = end

        client.each_logits(begun(tokenizer, tokens)[:-1], shape.first, use)
        on_chunk(number + 1, float(joined(parts).kld.mean()))
    return Divergence(joined(parts), chunks)


def _logprobs(logits: Float32, tokens: Sequence[int]) -> list[float]:
    most = logits.max(axis=1)
    total = np.log(np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64))
    chosen: list[float] = (logits[np.arange(len(tokens)), list(tokens)] - most - total).tolist()
    return chosen
