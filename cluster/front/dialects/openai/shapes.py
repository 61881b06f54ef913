"""Parts of OpenAI's replies: logprobs of either endpoint, usage, timings, names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamaclust.cluster.front.schema import Prompt
from llamaclust.cluster.front.text.answer import TextChunk, json_logprob
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.core.sampling import RowResult
from llamaclust.core.version import VERSION
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer

FINGERPRINT = f"build-llamaclust-{VERSION}-numerics-{NUMERICS_VERSION}"
"""`system_fingerprint`: equal ones compute alike."""


def ending(part: TextChunk) -> dict[str, Any]:
    """How a choice ended, null while it goes on. `stop_reason` (vLLM's) is the stop string or the end token's id."""
    if part.finish_reason is None or part.timings is None:
        return {"finish_reason": None}
    return {
        "finish_reason": str(part.finish_reason),
        "stop_reason": part.stopped_by,
        "timings": asdict(part.timings),
    }


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token at a place in a choice's text; without a row where nothing stands before it."""

    token: int
    offset: int
    row: RowResult | None


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands before its answers: its text, where each of its tokens begins, those without a logprob."""

    text: str
    offsets: tuple[int, ...]
    unscored: tuple[ShownToken, ...]


NO_ECHO = Echo("", (), ())


def make_echo(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], score_from: int) -> Echo:
    """The prompt as it was given, or the text of its token ids. Its first token never has a logprob."""
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special=True)
    detokenizer = Detokenizer(tokenizer, text_start=True)
    offsets, length = [], 0
    for token in ids:
        offsets.append(min(length, len(text)))
        length += len(detokenizer.push(token))
    unscored = zip(ids, offsets[: max(1, score_from)], strict=False)
    return Echo(text, tuple(offsets), tuple(ShownToken(token, offset, None) for token, offset in unscored))


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """Iterators, for many tokens."""
    rows = [token.row for token in tokens]
    return {
        "tokens": (_label(tokenizer, token.token) for token in tokens),
        "token_logprobs": (None if row is None else json_logprob(row.logprob) for row in rows),
        "top_logprobs": (None if row is None else _top(tokenizer, row) for row in rows),
        "text_offset": (token.offset for token in tokens),
    }


def _label(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes where they are only a part of a character."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(tokenizer: Tokenizer, row: RowResult) -> dict[str, float]:
    """The likeliest tokens by label, best first, and the chosen one; of tokens that look alike, the best."""
    labels: dict[str, float] = {}
    for token, logprob in (*row.top_logprobs, (row.token, row.logprob)):
        labels.setdefault(_label(tokenizer, token), json_logprob(logprob))
    return labels
